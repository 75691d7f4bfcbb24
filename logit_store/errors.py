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


def first_line(error: BaseException) -> str:
    """Returns what somebody else's code says of an error, as a piece of a sentence; its kind, if nothing.

    It is not cut: whoever hides an address in it must find the whole of it.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
