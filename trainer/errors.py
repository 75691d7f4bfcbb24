"""Errors that a user can mend: the command line prints their one sentence, no traceback, and exits with 2."""


class UserError(Exception):
    """Something the user can put right: what was found, what was expected, where, and what to do."""


class ConfigError(UserError):
    """A configuration key, value or combination that cannot be used."""


class DataError(UserError):
    """Text, token sequences or a logit store that cannot be used as they are."""


class ModelError(UserError):
    """A teacher or student that cannot be loaded or does not fit its store."""


class CheckpointError(UserError):
    """A checkpoint or run folder from which the run cannot go on."""
