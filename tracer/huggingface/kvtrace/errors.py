"""What can go wrong, as one line that says what, where and what to do."""


class CaptureError(Exception):
    """The capture failed and left no file."""


class UsageError(CaptureError, ValueError):
    """What was asked for makes no sense."""
