"""A checkpoint to a model that from_pretrained loads, with its card."""
