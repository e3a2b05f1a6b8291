"""Writes results as kvreplay reads them (docs/results-format.md)."""

import io

import h5py
import numpy as np

from . import __version__
from .output_file import OutputFile

_FORMAT_VERSION = 3
_BYTES_PER_NUMBER = 2  # that a kept position's cost is told in


def write_live_results(path, trace, results, positions, notes):
    """`results`: pairs of KeptSets and Outcome; `positions`: those of the evaluation queries; `notes`: what a reader of the
    numbers has to know. The file is complete or absent."""
    output = OutputFile(path)
    try:
        # HDF5 cannot be relied on to tell that a disk is full, so it writes to memory.
        image = io.BytesIO()
        with h5py.File(image, "w", libver=("v110", "v110")) as file:
            _write(file, trace, results, positions, notes)
        output.temporary.write_bytes(image.getbuffer())
        output.commit()
    except OSError as problem:
        raise output.failure(f"cannot be written: {problem.strerror or problem}") from None
    finally:
        output.abandon()


def _write(file, trace, results, positions, notes):
    evaluated = np.asarray(positions, np.int32)
    file.attrs.update({"format": "kvreplay-results", "format_version": _FORMAT_VERSION, "created_by": f"kvtrace {__version__}"})
    file["evaluation_positions"] = evaluated
    file.create_group("results")
    file.create_group("overlap")
    for index, (kept, outcome) in enumerate(results):
        group = file.create_group(f"results/{index}")
        sizes = np.array([[len(positions) for positions in layer] for layer in kept.of_layers(trace.num_layers)], float)
        group.attrs.update({
            "trace": kept.trace or trace.path, "trace_digest": trace.digest, "policy": kept.policy, "capacity": kept.capacity,
            "capacity_request": kept.capacity_request, "kept": sizes.mean(), "evict_at": kept.evict_at, "heads": kept.heads,
            "bytes_per_token": sizes.sum() * 2 * trace.head_dim * _BYTES_PER_NUMBER / kept.evict_at, "share": kept.share,
            # The names of oracles begin so; their kept sets do not say it.
            "oracle": int(kept.policy.startswith("oracle")), "model": trace.model, "num_layers": trace.num_layers,
            "num_query_heads": trace.num_query_heads, "num_kv_heads": trace.num_kv_heads,
            "prompt_length": trace.prompt_length})
        group["evaluation_positions"] = evaluated
        group["held"] = np.asarray(trace.held, np.int32)
        group["kept_per_layer"] = sizes.mean(1).astype(np.float32)
        for name in ("kl", "nll", "nll_increase", "agree"):
            group[name] = getattr(outcome, name).astype(np.float32)
        if notes:
            group.create_dataset("notes", data=notes, dtype=h5py.string_dtype())
    file.attrs["complete"] = 1
