"""Files that are complete or absent, never half-written."""

import os
import pathlib
import stat
import tempfile

from .errors import CaptureError


class OutputFile:
    """A file that is written under a temporary name beside its place and renamed when it is whole.

    Where the path is a symbolic link, what it leads to is meant. What stands there and must not be replaced (a folder,
    a device or pipe, a write-protected file) is an error at once, as is a folder that cannot be written to.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)  # as given: for messages
        if not str(path):
            raise CaptureError("the name of a file to write is empty")
        self._destination = pathlib.Path(os.path.realpath(path))
        try:
            mode = self._destination.stat().st_mode
        except OSError:
            mode = None  # what cannot be asked cannot be made either, which mkstemp tells
        if mode is not None and stat.S_ISDIR(mode):
            raise self.failure("is a folder; name a file to write")
        if mode is not None and not stat.S_ISREG(mode):
            raise self.failure("is a device or a pipe; name a file to write")
        if mode is not None and not os.access(self._destination, os.W_OK):
            raise self.failure("is write-protected; name another file")
        try:
            file, name = tempfile.mkstemp(prefix=f"{self._destination.name}.tmp-", dir=self._destination.parent)
        except OSError as problem:
            raise self.failure(f"cannot be written: {problem.strerror}") from None
        # mkstemp makes files that only their owner can read; results are as readable as any other file.
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(file, 0o666 & ~mask)
        os.close(file)
        self.temporary = pathlib.Path(name)

    def failure(self, reason):
        return CaptureError(f"{self.path}: {reason}")

    def commit(self):
        """Brings the written bytes to the disk and puts the file in its place, replacing what stood there."""
        try:
            file = os.open(self.temporary, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(self.temporary, self._destination)
        except OSError as problem:
            self.abandon()
            raise self.failure(f"cannot be written: {problem.strerror}") from None

    def abandon(self):
        """Takes away what was written and leaves the place as it was."""
        self.temporary.unlink(missing_ok=True)
