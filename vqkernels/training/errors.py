"""Errors without a traceback: wrong arguments, a full disk, a loss that is not finite."""


class UserError(ValueError):
    """What is wrong and what to do about it. The command line prints it without a traceback."""

    status = 2  # what the command line exits with


class ReportedElsewhere(UserError):
    """The error of another process of the same run, which prints it."""


class DiskFull(UserError):
    """Nothing more can be written; earlier files are whole."""

    status = 1


class Diverged(UserError):
    """A loss or a weight is no longer finite; the last checkpoint is from before."""

    status = 1
