#!/usr/bin/env python3
"""Writes the positions with the highest scores of a trace as kept sets, which kvreplay measures like a policy's.

    keep_by_scores.py TRACE CAPACITY KEPT

Put your own scores into scores(), from this trace or from wherever your method runs.
"""

import sys

import h5py
import numpy as np


def scores(layer, prompt_length):
    """The scores of a layer's positions for every KV head, [K, P]: here short keys are worth keeping (arXiv 2406.11430)."""
    keys = layer["keys"][:, :prompt_length].astype(np.float32)  # [K, P, D]
    return -np.linalg.norm(keys, axis=2)


def keep(scores, capacity):
    """The `capacity` best positions of each head, ascending; among equal scores the earlier ones: a list of [capacity]."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :capacity]
    return list(np.sort(best, axis=1))


def main(trace_path, capacity, kept_path):
    sets = []  # layer-major, then KV head
    with h5py.File(trace_path) as trace:
        prompt_length = int(trace["tokens/ids"].attrs["prompt_length"])
        for index in range(int(trace["model"].attrs["num_layers"])):
            sets += keep(scores(trace[f"layers/{index}"], prompt_length), capacity)

    with h5py.File(kept_path, "w", libver="latest") as file:
        file.attrs["format"] = "kvreplay-kept"
        group = file.create_group("kept/0")
        group.attrs["heads"] = "kv"  # or "query", with a set per query head
        group.attrs["evict_at"] = prompt_length
        group["kept"] = np.concatenate(sets).astype(np.int32)
        group["offsets"] = np.cumsum([0] + [len(kept) for kept in sets], dtype=np.int64)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.strip())
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
