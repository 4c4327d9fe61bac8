"""The one exception a user is meant to read."""


class UserError(Exception):
    """One sentence that says what is wrong and what to do; the CLI prints it and exits with code 2."""
