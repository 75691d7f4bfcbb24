"""The teacher pass: run a frozen teacher over a token store and write its records."""
