"""How a row becomes named planes of stored bytes, and back."""
