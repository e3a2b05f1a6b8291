"""Captures what every attention layer of a Hugging Face model saw into a kvtrace file, for kvreplay, and lets the model run on
with what kvreplay's policies keep of its cache."""

__version__ = "0.1.0"

from .capture import capture
from .errors import CaptureError, Error, EvictionError, UsageError
from .eviction import evicted

__all__ = ["CaptureError", "Error", "EvictionError", "UsageError", "capture", "evicted"]
