"""Prompts to answers of a teacher, in process or from an endpoint, as a corpus for `prepare`."""
