"""Errors of the logit store."""


class StoreError(Exception):
    """Something is wrong with a store or with what was asked of it.

    The message is one sentence for the user: what was found, what was expected, where, and what to do.
    """


class DamagedStoreError(StoreError):
    """Stored bytes are not the bytes that were written, or are missing."""


class InvalidRowError(StoreError):
    """A row breaks the rules of the record; the message names position and value."""


class NameTakenError(StoreError):
    """A file of that name exists already, with other bytes: nothing was replaced."""
