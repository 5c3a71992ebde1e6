"""The one error class for mistakes of the person at the keyboard."""


class UserError(ValueError):
    """Something the user gave is wrong: a file, a flag, a configuration key, a data set.

    The message says what was given, what is allowed and what to do. The command line prints it without a traceback
    and exits with code 2.
    """
