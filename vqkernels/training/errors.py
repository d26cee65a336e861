"""Errors that are one sentence: mistakes in what was asked for, and what no program can mend."""


class UserError(ValueError):
    """What is wrong and what to do about it, in one sentence. The command line prints it without a traceback."""

    status = 2  # what the command line exits with


class ToldElsewhere(UserError):
    """The mistake that another process of the same run has made, and prints."""


class DiskFull(UserError):
    """Nothing more can be written; what was there before is whole."""

    status = 1


class Diverged(UserError):
    """A loss or a weight is no longer finite; the last checkpoint is from before."""

    status = 1
