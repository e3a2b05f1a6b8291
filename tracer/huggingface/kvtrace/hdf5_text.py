"""Strings of HDF5 files, whatever of HDF5's kinds of strings they are."""

import os

import h5py

from .errors import Error


def text(attributes, name, default=""):
    """An attribute that is a string."""
    value = attributes.get(name, default)
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def texts(values):
    """The strings of a dataset or of an attribute that is a list."""
    return [value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value) for value in values]


def open_complete(path, kind, what, newest, remedy, failure=Error, unmarked=None):
    """A file of the format `kind` that is whole. Raises `failure`, in one line: `what` names what should be in it, `newest` is
    the latest version that is read, and `remedy` says how to get one. `unmarked`: a group by which files of other programs
    are known, which say neither what they are nor that they are whole."""
    try:
        file = h5py.File(path, "r")
    except OSError as problem:
        # HDF5's own text has several lines.
        reason = f"cannot be read: {os.strerror(problem.errno)}" if problem.errno else "is no HDF5 file, or a damaged one"
        raise failure(f"{path}: {reason}") from None
    try:
        found = text(file.attrs, "format")
        if not found and unmarked is not None and isinstance(file.get(unmarked), h5py.Group):
            return file
        if found != kind:
            raise failure(f"{path}: is no file of {what}{f', but of {found}' if found else ''}; {remedy}")
        version = int(file.attrs.get("format_version", 0))
        if version > newest:
            raise failure(f"{path}: is of version {version} of the format, and this kvtrace reads versions up to {newest}; "
                          "update kvtrace")
        if int(file.attrs.get("complete", 0)) != 1:
            raise failure(f"{path}: is unfinished: its attribute 'complete' is not 1; make it again")
    except BaseException:
        file.close()
        raise
    return file
