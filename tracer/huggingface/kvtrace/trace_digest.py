"""What kvreplay tells one capture from another by: the same for copies of a trace, wherever they lie.

As src/trace/identity.cpp computes it, of all that a trace says beside its tensors: results of both programs on one trace
carry the same digest.
"""

import h5py
import numpy as np
import xxhash

from .hdf5_text import text, texts

# Attributes that a layer may have, in order, and where a layer without has its number from: /model's attribute of another
# name, or a number.
_NUMBERS = (
    ("num_attention_heads", int, "num_attention_heads"), ("num_key_value_heads", int, "num_key_value_heads"),
    ("key_dim", int, "head_dim"), ("value_dim", int, "head_dim"), ("softmax_scale", float, "softmax_scale"),
    ("attn_logit_softcapping", float, "attn_logit_softcapping"), ("sliding_window", int, "sliding_window"),
    ("attention_chunk_size", int, 0), ("cache_of", int, -1), ("values_in_keys", int, 0))
_LISTS = ("sinks", "projection_norm", "projection_output_norm", "residual_norm")
_TENSORS = ("keys", "values", "queries", "outputs", "output_projection", "attention_mass", "output_gate")


def trace_digest(file):
    """Of an open trace, as 16 hexadecimal digits."""
    digest = xxhash.xxh64(seed=0)

    def add(value):
        digest.update(value.encode(errors="surrogateescape") + b"\0")

    model = file["model"].attrs
    for value in (text(model, "name"), text(model, "architecture"),
                  *(text(file.attrs, name) for name in ("created_by", "created_at", "source"))):
        add(value)
    tokens = file["tokens"]
    holder = tokens["ids"] if "prompt_length" in tokens["ids"].attrs else tokens
    for value in (*(int(model.get(name, 0)) for name in ("num_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                                                        "hidden_size", "sliding_window")),
                  int(holder.attrs["prompt_length"])):
        add(str(value))
    for name in ("rope_theta", "softmax_scale", "attn_logit_softcapping"):
        add(_number(float(model.get(name, 0))))
    for numbers in (tokens["ids"], tokens.get("turn_starts", ()), file["query_positions"]):
        add(",".join(map(str, np.asarray(numbers).tolist())))
    layers = [_Layer(file, number) for number in range(int(model["num_layers"]))]
    add(",".join(layer.fields["sliding_window"] for layer in layers))
    for layer in layers:
        layer.add_to(add)
    for name in sorted(file.get("rotary", ())):
        table = file["rotary"][name]
        add(f"rotary {name} {_number(float(table.attrs['attention_scaling']))} {text(table.attrs, 'layout')} {_floats(table)}")
    if "turn_starts" in tokens:
        for role in texts(tokens["turn_starts"].attrs.get("roles", ())):
            add(f"role {role}")
    for answer in texts(file["answers"][:] if "answers" in file else ()):
        add(f"answer {answer}")
    for piece in texts(tokens["pieces"][:] if "pieces" in tokens else ()):
        add(piece)
    for start, end, label, group in _spans(file):
        add(f"{start},{end},{label}")
        if group:
            add(f"group {group}")
    for layer in layers:
        for line in layer.tensors():
            add(line)
    return digest.hexdigest()


def tokens_digest(ids):
    """Of token ids, of whatever run, as src/trace/identity.cpp computes it."""
    return xxhash.xxh64(np.asarray(ids, "<i4").tobytes(), seed=0).hexdigest()


class _Layer:
    """What a layer's group says, as text; of one that is missing, which does not attend, what the model says."""

    def __init__(self, file, number):
        self._number, self._group = number, file.get(f"layers/{number}")
        model, own = file["model"].attrs, self._group.attrs if self._group is not None else {}
        plain = {name: _shown(kind, model.get(default, 0) if isinstance(default, str) else default)
                 for name, kind, default in _NUMBERS}
        self.fields = {name: _shown(kind, own[name]) if name in own else _shown(kind, model[name]) if name in model else
                       plain[name] for name, kind, _ in _NUMBERS}
        if int(own.get("values_in_keys", 0)) > 0 and "value_dim" not in own:
            self.fields["value_dim"] = self.fields["values_in_keys"]
        plain["rotary"] = ""
        self.fields["rotary"] = text(own, "rotary", text(model, "rotary")) if self._group is not None else ""
        for name in _LISTS:
            values = self._group.get(name) if self._group is not None else None
            plain[name] = self.fields[name] = ""
            if values is not None:
                epsilon = f"{_number(float(values.attrs['epsilon']))};" if name.endswith("projection_norm") or name.endswith(
                    "output_norm") else ""
                self.fields[name] = epsilon + _floats(values)
        self._own = {name: value for name, value in self.fields.items() if value != plain[name]}

    def add_to(self, add):
        if self._group is None:
            add(f"layer {self._number} does not attend")
        for name, value in self._own.items():
            if name != "sliding_window":
                add(f"layer {self._number} {name} {value}")

    def tensors(self):
        if self._group is None:
            return
        for name in (*_TENSORS, *_LISTS):
            dataset = self._group.get(name)
            if isinstance(dataset, h5py.Dataset):
                shape = ",".join(map(str, dataset.shape))
                yield f"{dataset.name} {float_type(dataset)} {shape} {text(dataset.attrs, 'xxh64')}"


def float_type(dataset):
    """Of a tensor of a trace: float32, float16 or bfloat16."""
    kind = dataset.id.get_type()
    if kind.get_size() == 4:
        return "float32"
    return "bfloat16" if kind.get_fields()[2] == 8 else "float16"


def _shown(kind, value):
    return str(int(value)) if kind is int else _number(float(value))


def _number(value):
    """As few digits as tell the number from others of its type, and no fraction of nothing."""
    return str(value).removesuffix(".0")


def _floats(dataset):
    return ",".join(_number(value) for value in np.asarray(dataset[:], np.float32))


def _spans(file):
    spans = file.get("annotations/spans")
    if spans is None:
        return
    if isinstance(spans, h5py.Dataset):  # version 1
        for start, end, label in spans[:]:
            yield int(start), int(end), texts([label])[0], ""
        return
    groups = texts(spans["group"][:]) if "group" in spans else [""] * len(spans["start"])
    yield from zip(spans["start"][:].tolist(), spans["end"][:].tolist(), texts(spans["label"][:]), groups)
