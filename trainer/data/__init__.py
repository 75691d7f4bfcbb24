"""Rows of stores to batches on every rank: order, read-ahead, tensors, rows left out."""
