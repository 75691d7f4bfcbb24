"""Hydra groups. They only override: every default lives in sparsekd.trainer.config.schema."""
