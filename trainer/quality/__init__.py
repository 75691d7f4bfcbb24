"""Proof: models judged side by side on held-out rows."""
