"""Exceptions that mean "not our fault": the command line prints them as a sentence and exits with 2."""


class InputError(ValueError):
    """What was wrong, what was got and what to do, in one sentence."""


class OutputError(InputError):
    """The disk did not take what was written; what is there already is good."""
