"""The one exception that means "the input is at fault"; the command line prints it as a sentence and exits with 2."""


class InputError(ValueError):
    """What was wrong, what was got and what to do, in one sentence."""
