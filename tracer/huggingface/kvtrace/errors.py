"""What can go wrong, as one line that says what, where and what to do."""


class Error(Exception):
    """Of all kinds."""


class CaptureError(Error):
    """The capture failed and left no file."""


class EvictionError(Error):
    """Kept sets cannot be read, or not be applied to what the model runs."""


class UsageError(CaptureError, ValueError):
    """What was asked for makes no sense."""
