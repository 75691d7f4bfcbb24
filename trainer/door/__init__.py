"""The command line: verbs, the store's actions, doctor."""
