"""Errors that a user can mend. The command line prints their one sentence, without a traceback, and exits with 2."""


class UserError(Exception):
    """Something the user can put right: the message says what was found, what was expected, where, what to do."""


class ConfigError(UserError):
    """A configuration key, value or combination that cannot be used."""


class DataError(UserError):
    """Text, token sequences or a logit store that cannot be used as they are."""


class ModelError(UserError):
    """A teacher or student that cannot be loaded or does not fit its store."""


class CheckpointError(UserError):
    """A checkpoint or run folder from which the run cannot go on."""
