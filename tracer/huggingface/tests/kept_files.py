"""Files of kept sets as kvreplay writes them, made up."""

import h5py
import numpy as np


def make_sets(layers, heads, evict_at, *, unequal=False, first=None, seed=1):
    """Random ascending positions of every head of every layer, the last three among them. `first`: of each layer, the first
    position that it holds."""
    generator = np.random.default_rng(seed)
    sets = []
    for layer in range(layers):
        start = first[layer] if first is not None else 0
        most = evict_at - start
        for head in range(heads):
            count = min(most, 9 + (3 * head + layer if unequal else 2 * (layer % 2)))
            chosen = start + generator.permutation(most - 3)[: count - 3] if count > 3 else []
            sets.append(np.sort(np.concatenate([chosen, np.arange(evict_at - 3, evict_at)])).astype(np.int32))
    return sets


def write_kept(path, *groups, complete=1, version=3, kind="kvreplay-kept"):
    """`groups`: of each, its sets and its attributes."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"format": kind, "format_version": version, "created_by": "a test"})
        if complete is not None:
            file.attrs["complete"] = complete
        kept = file.create_group("kept")
        for index, (sets, attributes) in enumerate(groups):
            group = kept.create_group(str(index))
            group.attrs.update({"trace": "run.h5", "policy": f"policy-{index}", "capacity": 9, "capacity_request": "9",
                                "share": "mean", "heads": "kv", **attributes})
            group["kept"] = np.concatenate(sets).astype(np.int32)
            group["offsets"] = np.cumsum([0, *map(len, sets)]).astype(np.int64)
    return path
