"""The exceptions a user is meant to read."""


class UserError(Exception):
    """One sentence that says what is wrong and what to do; the CLI prints it and exits with code 2."""


class ServingError(Exception):
    """A started server died or never served; names it and its log. The CLI prints it and exits with code 1."""
