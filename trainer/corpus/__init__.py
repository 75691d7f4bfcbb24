"""From text to token sequences with document boundaries and loss masks."""
