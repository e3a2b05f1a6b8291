"""What a trace says of a run, read by h5py and computed anew by NumPy alone, as docs/trace-format.md means it: what captures
are held against, here and in the tests."""

import dataclasses

import h5py
import numpy as np


@dataclasses.dataclass
class PlainLayer:
    """A layer that attends. Tensors are float64; None where the trace has none."""

    attributes: dict  # those of its group, and else the model's
    keys: np.ndarray  # [K, T, Dk], of the layer whose cache it reads
    values: np.ndarray  # [K, T, Dv], likewise
    queries: np.ndarray  # [H, Q, Dk]
    outputs: np.ndarray  # [H, Q, Dv], as they were captured
    positions: np.ndarray  # [Q]
    tensors: dict  # all that its group has
    epsilons: dict  # of norms, by name

    def attention(self, evicted=None):
        """Outputs [H, Q, Dv], and the weights [H, Q, T] that they come of; `evicted`: what queries do not see besides, bool
        [Q, T]."""
        group = self.queries.shape[0] // self.keys.shape[0]
        logits = self.queries @ np.repeat(self.keys, group, 0).transpose(0, 2, 1) * self.attributes["softmax_scale"]
        cap = self.attributes["attn_logit_softcapping"]
        if cap:
            logits = np.tanh(logits / cap) * cap
        positions = np.arange(self.keys.shape[1])
        behind = self.positions[:, None] - positions
        hidden = behind < 0
        if window := int(self.attributes["sliding_window"]):
            hidden |= behind >= window
        if size := int(self.attributes.get("attention_chunk_size", 0)):
            hidden |= positions < self.positions[:, None] // size * size
        if evicted is not None:
            hidden |= evicted
        sinks = self.tensors.get("sinks", np.full(len(logits), -np.inf))[:, None, None]
        highest = np.maximum(np.where(hidden, -np.inf, logits).max(-1, keepdims=True), sinks)
        weights = np.exp(np.where(hidden, -np.inf, logits - highest))
        weights /= weights.sum(-1, keepdims=True) + np.exp(sinks - highest)
        return weights @ np.repeat(self.values, group, 0), weights

    def entering(self, outputs):
        """What enters the projection of heads' outputs [H, Q, Dv], through gate and norm: [Q, H·Dv]."""
        if "output_gate" in self.tensors:
            gate = self.tensors["output_gate"]
            outputs = outputs * (gate[..., None] if gate.ndim == 2 else gate)
        rows = outputs.transpose(1, 0, 2).reshape(outputs.shape[1], -1)
        return self._normed(rows, "projection_norm")

    def block_output(self, evicted=None):
        """What the projection gives but for a bias, [Q, C]."""
        return self.entering(self.attention(evicted)[0]) @ self.tensors["output_projection"].T

    def _normed(self, rows, name):
        if name not in self.tensors:
            return rows
        return rows / np.sqrt((rows**2).mean(1, keepdims=True) + self.epsilons[name]) * self.tensors[name]


def read_layers(path):
    """The layers that attend, by number."""
    layers = {}
    with h5py.File(path) as file:
        model, positions = dict(file["model"].attrs), file["query_positions"][:]
        for number in range(int(model["num_layers"])):
            if f"layers/{number}" not in file:
                continue
            group = file[f"layers/{number}"]
            attributes = {"key_dim": model["head_dim"], "value_dim": model["head_dim"], **model, **group.attrs}
            tensors = {name: group[name][:].astype(np.float64) for name in group}
            if "cache_of" in attributes:
                owner = layers[int(attributes["cache_of"])]
                keys, values = owner.keys, owner.values
            else:
                keys = tensors["keys"]
                values = tensors["values"] if "values" in tensors else keys[..., : int(attributes["values_in_keys"])]
            layers[number] = PlainLayer(attributes, keys, values, tensors["queries"], tensors["outputs"], positions, tensors,
                                        {name: float(group[name].attrs["epsilon"]) for name in group
                                         if "epsilon" in group[name].attrs})
    return layers
