"""How positions turn a layer's keys: found among the tables that a model has, and held against what it did to them."""

import dataclasses

import torch

# How far, in parts of their norm, keys that a table turns may be from those that the model turned: rounding in the type.
# Another table, another layout or another number of dimensions is further off than this at once.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Table:
    """A dataset of /rotary."""

    name: str
    inverse_frequencies: torch.Tensor  # [R/2], float32, on the CPU
    attention_scaling: float
    layout: str  # half or interleaved

    def turn(self, keys, positions):
        """Keys [K, n, D] in float32 at `positions` [n], turned."""
        frequencies = self.inverse_frequencies.to(keys.device)
        angles = positions[:, None].float() * frequencies
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        half = frequencies.shape[0]
        turning, rest = keys[..., : 2 * half], keys[..., 2 * half :]
        if self.layout == "half":
            left, right = turning[..., :half], turning[..., half:]
            turned = torch.cat([left * cosines - right * sines, right * cosines + left * sines], -1)
        else:
            left, right = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack([left * cosines - right * sines, right * cosines + left * sines], -1).flatten(-2)
        return torch.cat([turned, rest], -1)


def tables_of(decoder):
    """What the modules of a decoder could turn keys with: a table for each layout of each of their frequencies."""
    tables = {}  # by name
    for path, module in decoder.named_modules():
        if "Rotary" not in type(module).__name__:
            continue
        for name, frequencies in module.named_buffers(recurse=False):
            # Where kinds of layers differ, the kind stands before.
            kind = name.removesuffix("inv_freq")
            if not name.endswith("inv_freq") or kind.endswith("original_") or frequencies.dim() != 1:
                continue
            frequencies = frequencies.detach().float().cpu().clone()
            scaling = float(getattr(module, f"{kind}attention_scaling", 1.0))
            if any(torch.equal(frequencies, other) and scaling == its for other, its in tables.values()):
                continue
            label = kind.strip("_") or path.rpartition(".")[2]
            tables[f"{label}-{len(tables)}" if label in tables else label] = frequencies, scaling
    return [Table(name, frequencies, scaling, layout) for name, (frequencies, scaling) in tables.items()
            for layout in ("half", "interleaved")]


def turning_table(tables, before, after, positions):
    """Which of the tables made the keys `after` [K, n, D] of one of those `before` at `positions` [n]; None if none did."""
    expected = after.float()
    norm = float(expected.norm())
    distances = [(float((table.turn(keys.float(), positions) - expected).norm()), index)
                 for index, table in enumerate(tables) if 2 * len(table.inverse_frequencies) <= after.shape[2]
                 for keys in before]
    distance, index = min(distances, default=(float("inf"), None))
    return tables[index] if distance <= _ROUNDING[after.dtype] * norm else None


class UnturnedKeys:
    """Keeps what a layer's keys are before they are turned: the output of its key projection, or of the norm behind it,
    until taken."""

    _NAMES = ("k_proj", "k_norm", "k_layernorm", "key_layernorm", "key_norm")

    def __init__(self, parts):
        self._keys = None
        self.hooks = [part.register_forward_hook(self._keep) for part in parts]

    @classmethod
    def of(cls, module):
        """None where an attention module has no key projection that is known by name."""
        parts = [part for name in cls._NAMES if isinstance(part := getattr(module, name, None), torch.nn.Module)]
        return cls(parts) if parts else None

    def _keep(self, module, arguments, result):
        self._keys = result.detach() if isinstance(result, torch.Tensor) else None

    def take(self, shape):
        """As [K, n, D] of `shape`: what they may be, since heads stand before or behind positions. Nothing more is kept."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        keys, self._keys = self._keys, None
        heads, count, dim = shape
        found = []
        if keys is not None and tuple(keys.shape) == (1, heads, count, dim):
            found.append(keys[0])
        if keys is not None and tuple(keys.shape) in ((1, count, heads * dim), (1, count, heads, dim)):
            found.append(keys.reshape(count, heads, dim).transpose(0, 1))
        return found
