"""Proof and planning: evaluate, report, plan."""
