"""Captures what every attention layer of a Hugging Face model saw into a kvtrace file, for kvreplay."""

__version__ = "0.1.0"

from .capture import capture
from .errors import CaptureError, UsageError

__all__ = ["CaptureError", "UsageError", "capture"]
