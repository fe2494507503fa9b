"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, the value, the remedy and the config key or path.

    The command line prints the message alone and exits with code 2.
    """
