"""How large, how long, how much memory: before money is spent."""
