"""Settings: the typed schema, Hydra's composition, and checks that need no torch."""
