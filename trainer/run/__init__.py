"""The life of a process: its ranks, its folder, its figures, its errors and its end."""
