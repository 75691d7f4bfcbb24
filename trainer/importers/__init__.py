"""Readers of what others captured: each turns its source into documents, which `store` makes into a store."""
