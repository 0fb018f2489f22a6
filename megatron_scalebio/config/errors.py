"""What a user gave and cannot be used."""


class UserError(Exception):
    """A mistake in what the user gave: one message that names the file, line, source or key, the rule and the values.

    The command line prints it without a traceback and exits with status 2.
    """
