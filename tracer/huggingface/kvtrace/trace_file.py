"""Writes kvtrace files piece by piece, while the run that they record goes on."""

import contextlib
import datetime
import io
import math
import os

import h5py
import numpy as np
import torch
from h5py import h5d, h5p, h5s, h5t

from .errors import CaptureError
from .output_file import OutputFile

# A chunk holds all heads of a range of positions: large enough to be read at the disk's speed, small enough that the
# one at a tensor's end, which is stored whole, wastes little.
_CHUNK_BYTES = 1 << 20
_LEAST_ROWS = 16
_PIECES = 16

# More of them make HDF5 slow, and leave less than pages of each head to be read together.
_MOST_CHUNKS = 128


def _bfloat16():
    kind = h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    return kind


_TYPES = {
    torch.float32: (h5t.IEEE_F32LE, np.dtype("<f4")),
    torch.float16: (h5t.IEEE_F16LE, np.dtype("<f2")),
    torch.bfloat16: (_bfloat16(), np.dtype("<i2")),  # NumPy has none; its bits
}
FLOAT_TYPES = tuple(_TYPES)


def _bits(tensor):
    """The tensor's elements as an array of what is stored."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Disk(io.FileIO):
    """What HDF5 writes to, and sees no failure of: with pages left that it cannot write, HDF5 closes no file and takes
    the process down at its end. The first failure is kept; what comes after it goes nowhere.
    """

    def __init__(self, path):
        super().__init__(path, "r+")
        self.failure = None

    def write(self, data):
        left = memoryview(data)
        size = len(left)
        try:
            while len(left) > 0 and self.failure is None:
                left = left[super().write(left):]
        except OSError as problem:
            self.failure = problem
        return size

    def truncate(self, size=None):
        try:
            if self.failure is None:
                super().truncate(size)
        except OSError as problem:
            self.failure = problem
        return size


class Rows:
    """A tensor [heads, n, ...] that grows along n. Holds less than a chunk in memory."""

    def __init__(self, file, path, heads, of_row, dtype, expected, most):
        """`of_row`: the shape of a head's row; `expected`: about how many rows there will be; `most`: how many there may be,
        or 0."""
        kind, self._array_type = _TYPES[dtype]
        self.path, self.dtype, self.shape, self.count = path, dtype, (heads, *of_row), 0
        row_bytes = math.prod(self.shape) * self._array_type.itemsize
        wanted = max(-(-expected // _PIECES), -(-most // _MOST_CHUNKS))
        self._rows = max(_LEAST_ROWS, min(wanted, _CHUNK_BYTES // row_bytes))
        self._buffer = np.zeros((heads, self._rows, *of_row), self._array_type)
        self._filled = 0
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_chunk((heads, self._rows, *of_row))
        creation.set_fill_time(h5d.FILL_TIME_NEVER)
        creation.set_obj_track_times(False)  # the same run gives the same bytes
        # Two axes without a limit, though only one grows: HDF5 1.10 misnames the chunks where it is one.
        space = h5s.create_simple((heads, 0, *of_row), (h5s.UNLIMITED, h5s.UNLIMITED, *of_row))
        self._dataset = h5d.create(file.id, path.encode(), kind, space, creation)

    def append(self, tensor):
        """`tensor`: [heads, n, ...], on the CPU."""
        values = _bits(tensor)
        done = 0
        while done < values.shape[1]:
            count = min(values.shape[1] - done, self._rows - self._filled)
            self._buffer[:, self._filled : self._filled + count] = values[:, done : done + count]
            self._filled += count
            self.count += count
            done += count
            if self._filled == self._rows:
                self.flush()

    def flush(self):
        """Writes what is in memory. Only the last piece may be less than a chunk."""
        if self._filled == 0:
            return
        heads, *of_row = self.shape
        self._dataset.set_extent((heads, self.count, *of_row))
        # HDF5 would pass every value through its own buffers; the bytes are right as they are.
        self._dataset.write_direct_chunk((0, self.count - self._filled, *(0 for _ in of_row)), self._buffer.tobytes(), 0)
        self._buffer[:] = 0
        self._filled = 0


class TraceFile:
    """A kvtrace file in the making: it gets its name when finish() succeeds; abandon() leaves nothing."""

    def __init__(self, path, most_tokens=0):
        """`most_tokens`: how many may run, or 0 where that is not known."""
        self._output = OutputFile(path)
        self._most_tokens = most_tokens
        self._rows = {}
        try:
            self._disk = _Disk(self._output.temporary)
            # These bounds have checksums and can be read by HDF5 from 1.10 on.
            self._file = h5py.File(self._disk, "w", libver=("v110", "v110"))
            self._file.attrs["format"] = "kvtrace"
            self._file.attrs["format_version"] = 2
        except BaseException as problem:
            self._output.abandon()
            if isinstance(problem, OSError):
                raise self._failure(problem) from None
            raise

    @property
    def path(self):
        return self._output.path

    def _failure(self, problem):
        reason = os.strerror(problem.errno) if getattr(problem, "errno", None) else str(problem).splitlines()[0]
        return CaptureError(f"{self.path}: cannot be written: {reason}")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, RuntimeError) as problem:
            raise self._failure(self._disk.failure or problem) from None
        if self._disk.failure is not None:
            raise self._failure(self._disk.failure)

    def fail(self, where, reason):
        raise CaptureError(f"{self.path}: {where}: {reason}")

    def _check_finite(self, tensor, path, place):
        if bool(torch.isfinite(tensor).all()):
            return
        at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        what = "NaN" if bool(torch.isnan(tensor[tuple(at)])) else "infinity"
        self.fail(path, f"{what} at {place(at)}; the run itself produced it")

    def append(self, layer, name, tensor, first, expected):
        """The next rows [heads, n, ...] of a layer's tensor, whose first is that of position `first`."""
        path = f"/layers/{layer}/{name}"
        self._check_finite(tensor, path, lambda at: f"layer {layer}, head {at[0]}, position {first + at[1]}")
        with self._writing():
            rows = self._rows.get(path)
            if rows is None:
                self._file.require_group(f"layers/{layer}")
                rows = Rows(self._file, path, tensor.shape[0], tensor.shape[2:], tensor.dtype, expected,
                            self._most_tokens)
                self._rows[path] = rows
            if rows.shape != (tensor.shape[0], *tensor.shape[2:]) or rows.dtype != tensor.dtype:
                self.fail(path, "changes its shape or type during the run")
            rows.append(tensor)

    def write(self, layer, name, tensor, **attributes):
        """A layer's tensor that is written at once, such as output_projection or attention_mass."""
        path = f"/layers/{layer}/{name}"
        self._check_finite(tensor, path, lambda at: f"layer {layer}, element {', '.join(map(str, at))}")
        kind = _TYPES[tensor.dtype][0]
        with self._writing():
            self._file.require_group(f"layers/{layer}")
            creation = h5p.create(h5p.DATASET_CREATE)
            creation.set_obj_track_times(False)
            dataset = h5d.create(self._file.id, path.encode(), kind, h5s.create_simple(tuple(tensor.shape)), creation)
            dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(_bits(tensor)), kind)
            self._file[path].attrs.update(attributes)

    def finish(self, *, model, layers, rotary, ids, prompt_length, next_token, pieces, query_positions, spans, turns,
               source, provenance):
        """Writes everything but the tensors, marks the file complete and puts it in its place.

        `model`: the attributes of /model; `layers`: those of the groups of layers that attend, by number; `rotary`: tables; `next_token`: the most likely
        id after the prompt and its logit, or None; `spans`: (start, end, label); `turns`: (start, who speaks), where
        nobody is named None.
        """
        from . import __version__

        seconds = int(os.environ["SOURCE_DATE_EPOCH"]) if "SOURCE_DATE_EPOCH" in os.environ else None
        now = datetime.datetime.now(datetime.timezone.utc) if seconds is None else datetime.datetime.fromtimestamp(
            seconds, datetime.timezone.utc)
        with self._writing():
            for rows in self._rows.values():
                rows.flush()
            file = self._file
            file.attrs["created_by"] = f"kvtrace {__version__}"
            file.attrs["created_at"] = now.strftime("%Y-%m-%dT%H:%M:%SZ")
            file.attrs["source"] = source
            file.create_group("model").attrs.update(model)
            file.create_group("provenance").attrs.update(provenance)
            for layer, attributes in layers.items():
                file[f"layers/{layer}"].attrs.update(attributes)
            for table in rotary:
                frequencies = table.inverse_frequencies.numpy().astype("<f4")
                dataset = file.require_group("rotary").create_dataset(table.name, data=frequencies, track_times=False)
                dataset.attrs["attention_scaling"] = table.attention_scaling
                dataset.attrs["rotated_dims"] = np.int64(2 * len(frequencies))
                dataset.attrs["layout"] = table.layout
            file.create_group("tokens")  # on the way to a dataset it would be dated
            file["tokens/ids"] = np.asarray(ids, "<i4")
            file["tokens"].attrs["prompt_length"] = np.int64(prompt_length)
            file["tokens/ids"].attrs["prompt_length"] = np.int64(prompt_length)
            if next_token is not None:
                file["tokens"].attrs["next_id"], file["tokens"].attrs["next_logit"] = np.int64(next_token[0]), next_token[1]
            if pieces is not None:
                file.create_dataset("tokens/pieces", data=pieces, dtype=h5py.string_dtype())
            if turns:
                file["tokens/turn_starts"] = np.asarray([start for start, _ in turns], "<i4")
                if turns[0][1] is not None:
                    roles = np.array([role for _, role in turns], h5py.string_dtype())
                    file["tokens/turn_starts"].attrs["roles"] = roles
            file["query_positions"] = np.asarray(query_positions, "<i4")
            if spans:
                starts, ends, labels = zip(*spans)
                group = file.create_group("annotations").create_group("spans")
                group["start"], group["end"] = np.asarray(starts, "<i4"), np.asarray(ends, "<i4")
                group.create_dataset("label", data=labels, dtype=h5py.string_dtype())
            file.flush()
        with self._writing():
            # Last, so that a file in which anything is missing cannot carry it.
            file.attrs["complete"] = 1
            file.close()
            self._disk.close()
        self._output.commit()

    def remove_name(self):
        """Takes away what was written. More may be written until abandon(), and goes nowhere."""
        self._output.abandon()

    def abandon(self):
        self.remove_name()
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()
            self._disk.close()
