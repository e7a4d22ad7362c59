"""The exceptions whose messages are meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and how to fix it.

    Command-line programs print it without a traceback and exit with `status`.
    """

    status = 2


class RunError(UserError):
    """A run that was well asked for cannot go on: a full disk, numbers that are no longer finite. The message is as above."""

    status = 1
