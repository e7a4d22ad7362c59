"""The exceptions whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and how to fix it.

    Command-line programs print it without a traceback and exit with status 2.
    """


class RunError(RuntimeError):
    """A run that began well cannot go on: the message is one line that says why.

    Command-line programs print it without a traceback and exit with status 1.
    """
