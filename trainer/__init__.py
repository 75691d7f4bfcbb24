"""The verbs and what they share: configuration, errors, the causal language model, tracking."""
