"""The training loop: engine, head, data plan, checkpoint, export."""
