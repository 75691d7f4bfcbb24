"""How shards are written, committed, sealed, read, recovered and repaired."""
