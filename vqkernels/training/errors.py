"""The one exception for mistakes in what was asked for: a wrong path, an unreadable image, a foreign directory."""


class UserError(ValueError):
    """What is wrong and what to do about it, in one sentence. The command line prints it without a traceback."""


class ToldElsewhere(UserError):
    """The mistake that another process of the same run has made, and prints."""
