"""The losses over sparse teacher records and the teacher's head statistics (torch and triton only)."""
