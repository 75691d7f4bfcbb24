"""The training loop: set-up, head, engine, steps, evaluation."""
