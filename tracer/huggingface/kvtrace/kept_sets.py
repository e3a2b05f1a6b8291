"""Reads the kept sets that `kvreplay replay --kept` writes, and those of other programs that kvreplay's `kept(file=…)` reads."""

import dataclasses

import h5py
import numpy as np

from .errors import EvictionError
from .hdf5_text import open_complete, text

_NEWEST_VERSION = 4


@dataclasses.dataclass(frozen=True)
class KeptSets:
    """A group /kept/<i>: what a policy kept at an eviction."""

    place: str  # the file and the group, for messages
    trace: str  # empty where the file does not say, like both digests
    trace_digest: str
    tokens_digest: str  # of the tokens before the eviction
    policy: str
    capacity: int
    capacity_request: str
    share: str
    evict_at: int
    heads: str  # query or kv: which heads have a set each
    sets: tuple  # of every layer, of every head: ascending positions, int32

    @property
    def tells_no_run(self):
        """Whether the file says nothing that tells its run from others."""
        return not self.trace_digest and not self.tokens_digest

    def of_layers(self, count):
        """The sets of each of `count` layers, a list for each."""
        if len(self.sets) % count:
            raise EvictionError(f"{self.place}: holds {len(self.sets)} sets, which the model's {count} layers cannot share; "
                                "the kept sets are of another model")
        heads = len(self.sets) // count
        return [self.sets[layer * heads : (layer + 1) * heads] for layer in range(count)]


def _open(path):
    file = open_complete(path, "kvreplay-kept", "kept sets", _NEWEST_VERSION, "kvreplay replay --kept writes one",
                         EvictionError, "kept")
    if isinstance(file.get("kept"), h5py.Group):
        return file
    file.close()
    raise EvictionError(f"{path}: holds no kept sets (a group /kept)")


def kept_indices(path):
    """The indices of the file's kept sets, ascending."""
    with _open(path) as file:
        return sorted(int(name) for name in file["kept"] if name.isdecimal())


def read_kept_sets(path, index):
    """The KeptSets of /kept/<index>. Raises EvictionError, in one line, where they cannot be applied to a run once."""
    with _open(path) as file:
        group = file["kept"].get(str(index)) if type(index) is int and index >= 0 else None
        if not isinstance(group, h5py.Group):
            raise EvictionError(f"{path}: has no kept sets of index {index}; {_listed(file)}")
        return _read(f"{path}: /kept/{index}", group)


def _listed(file):
    there = {int(name): group for name, group in file["kept"].items() if name.isdecimal()}
    shown = [f"{index} ({text(there[index].attrs, 'policy')} at {text(there[index].attrs, 'capacity_request')})"
             for index in sorted(there)]
    if len(shown) > 8:
        shown[4:-2] = ["..."]
    return f"there are {', '.join(shown)}" if shown else "there are none"


def _read(place, group):
    if "until" in group:
        raise EvictionError(f"{place}: was evicted more than once (until), and a run is evicted once here; replay with a policy "
                            "that evicts at the end of the prompt alone")
    heads = text(group.attrs, "heads")
    if heads not in ("query", "kv"):
        raise EvictionError(f"{place}: heads is '{heads}', not query or kv")
    if "evict_at" not in group.attrs:
        raise EvictionError(f"{place}: does not say where the eviction was (evict_at)")
    try:
        kept, offsets = group["kept"][:], group["offsets"][:].astype(np.int64)
    except (KeyError, OSError, TypeError, ValueError):
        raise EvictionError(f"{place}: its kept positions or offsets are missing or damaged") from None
    evict_at = int(group.attrs["evict_at"])
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(kept) or bool((np.diff(offsets) < 0).any()):
        raise EvictionError(f"{place}: offsets must ascend from 0 to the number of kept positions, {len(kept)}")
    sets = tuple(kept[start:end] for start, end in zip(offsets[:-1], offsets[1:]))
    for number, positions in enumerate(sets):
        if len(positions) == 0:
            raise EvictionError(f"{place}: set {number} is empty")
        if positions[0] < 0 or positions[-1] >= evict_at or bool((np.diff(positions) <= 0).any()):
            raise EvictionError(f"{place}: set {number} is not ascending positions before the eviction at {evict_at}")
    # Other programs need not say more than heads and evict_at.
    capacity = int(group.attrs.get("capacity", max(map(len, sets))))
    return KeptSets(place, text(group.attrs, "trace"), text(group.attrs, "trace_digest"), text(group.attrs, "tokens_digest"),
                    text(group.attrs, "policy", "kept"), capacity, text(group.attrs, "capacity_request", str(capacity)),
                    text(group.attrs, "share", "mean"), evict_at, heads, sets)
