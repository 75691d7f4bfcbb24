"""Checkpoints: saved, found again, and made to fit another world size."""
