"""Reads what a run of the model is checked against and continued with."""

import dataclasses

import h5py
import numpy as np

from .errors import Error
from .hdf5_text import open_complete, text
from .trace_digest import float_type, trace_digest

_NEWEST_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Trace:
    """Of a trace what a live run needs."""

    path: str
    digest: str
    model: str
    ids: list  # [T]
    prompt_length: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    held: list  # [L] positions that each layer holds at the end of the prompt
    checked: list  # [r] positions of which keys are at hand
    keys: list  # [L] of each layer [K, r, D], float32
    weight_shapes_digest: str  # of the model's weights; empty: not known, like the next
    next_token: tuple  # the most likely id after the prompt, and its logit; or None
    dtype: str  # that keys are stored in: float32, float16 or bfloat16

    def fail(self, reason):
        raise Error(f"{self.path}: {reason}")


def read_trace(path):
    """Raises Error, in one line, where the file is no trace that a model's run can be held against."""
    with open_complete(path, "kvtrace", "a captured run", _NEWEST_VERSION,
                       "kvtrace-capture and kvreplay capture write one") as file:
        try:
            return _read(str(path), file)
        except (KeyError, ValueError, TypeError, OSError) as problem:
            raise Error(f"{path}: is damaged: {str(problem).splitlines()[0]}") from None


def _read(path, file):
    tokens, model = file["tokens"], file["model"].attrs
    ids = tokens["ids"][:].tolist()
    length = int((tokens["ids"] if "prompt_length" in tokens["ids"].attrs else tokens).attrs["prompt_length"])
    next_token = None
    if "next_id" in tokens.attrs:
        next_token = int(tokens.attrs["next_id"]), float(tokens.attrs["next_logit"])
    checked = sorted({0, length // 2, length - 1})
    held, keys = [], []
    for number in range(int(model["num_layers"])):
        group = file.get(f"layers/{number}")
        if not isinstance(group, h5py.Group) or "keys" not in group:
            raise Error(f"{path}: layer {number} has no keys of its own; runs of such models cannot be evicted")
        if "values_in_keys" in group.attrs:
            raise Error(f"{path}: layer {number} holds latent rows (MLA); runs of such models cannot be evicted")
        window = int(group.attrs.get("sliding_window", model.get("sliding_window", 0)))
        chunk = int(group.attrs.get("attention_chunk_size", model.get("attention_chunk_size", 0)))
        held.append(min(length, window - 1 if window else length, length % chunk if chunk else length))
        keys.append(np.asarray(group["keys"][:, checked], np.float32))
    return Trace(path=path, digest=trace_digest(file), model=text(model, "name"), ids=ids, prompt_length=length,
                 num_layers=int(model["num_layers"]), num_query_heads=int(model["num_attention_heads"]),
                 num_kv_heads=int(model["num_key_value_heads"]), head_dim=int(model["head_dim"]), held=held, checked=checked,
                 keys=keys, weight_shapes_digest=text(model, "weight_shapes_digest"), next_token=next_token,
                 dtype=float_type(file["layers/0/keys"]))
