"""How what a layer's attention reads comes of what its cache holds, which is what a trace has."""

import torch

from .plain_attention import plain_attention
from .trace_file import FLOAT_TYPES

# How far, in parts of their norm, keys and values made of latent rows may be from those that attention reads.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# Of outputs of latent attention that are computed together.
_BLOCK_BYTES = 64 << 20


class AsCached:
    """Attention reads what the cache holds."""

    attributes = {}  # of the layer's group
    reads_cache = False  # whether rows() needs what the cache holds

    def rows(self, key, value, cached):
        """Keys and values as they stand in the cache, [K, m, Dk] and [K, m, Dv]; `cached`: what it holds."""
        return key[0], value[0]

    def queries(self, query):
        """[H, n, Dk] of queries [1, H, n, Dk] of attention."""
        return query[0]

    def outputs(self, output, queries, keys, values, positions, first_key, rule):
        """[H, n, Dv] of attention's `output` [1, n, H, Dv], which queries at `positions` gave."""
        return output[0].transpose(0, 1)

    def expand(self, outputs):
        """What attention should give, [n, H, Dv], where these are outputs()."""
        return outputs.transpose(0, 1)

    def of_heads(self, tensor):
        """What attention's heads have, [H, ...], in the trace's order."""
        return tensor

    def gate_fault(self, width, normed):
        """Why outputs cannot go through a gate of so many factors for each head, or through a norm; or None."""
        return None

    def projection(self, weight):
        """A projection [C, H·Dv] of outputs()."""
        return weight


class Copied(AsCached):
    """Attention reads copies of the cache's heads, and not those that belong together in a row."""

    def __init__(self, sources, heads):
        """`sources`: of which head of the cache each of the attention's KV heads is; `heads`: query heads."""
        group = heads // len(sources)
        self._order = sorted(range(heads), key=lambda head: sources[head // group])
        self._firsts = [sources.index(head) for head in range(max(sources) + 1)]

    @staticmethod
    def find(key, value, keys, values, heads):
        """A form, or None."""
        given, held = (torch.cat(pair, -1)[0, :, -1] for pair in ((key, value), (keys, values)))
        sources = [next((head for head, row in enumerate(held) if torch.equal(row, copy)), None) for copy in given]
        counts = {sources.count(head) for head in range(len(held))}
        return Copied(sources, heads) if None not in sources and len(counts) == 1 else None

    def rows(self, key, value, cached):
        return key[0, self._firsts], value[0, self._firsts]

    def queries(self, query):
        return query[0, self._order]

    def outputs(self, output, queries, keys, values, positions, first_key, rule):
        return output[0, :, self._order].transpose(0, 1)

    def expand(self, outputs):
        expanded = torch.empty_like(outputs)
        expanded[self._order] = outputs
        return expanded.transpose(0, 1)

    def of_heads(self, tensor):
        return tensor[self._order]

    def projection(self, weight):
        heads = len(self._order)
        return weight.unflatten(1, (heads, -1))[:, self._order].flatten(1)


class Latent(AsCached):
    """Latent attention (MLA): the cache holds one row of latent values and one of rotary keys for each token, of which every
    head's keys and values are made by a matrix. That is taken into the queries and into the projection."""

    reads_cache = True

    def __init__(self, of_keys, of_values, turned):
        """`of_keys` [H, Dk − R, r], `of_values` [H, Dv, r]: what makes keys and values of a latent row; `turned` = R."""
        self._of_keys, self._of_values = of_keys, of_values  # the module's own memory
        self.attributes = {"num_key_value_heads": 1, "key_dim": of_keys.shape[2] + turned, "value_dim": of_values.shape[2],
                           "values_in_keys": of_values.shape[2]}

    @staticmethod
    def find(module, key, value, keys, values):
        """Of what attention reads, [1, H, m, D], and of the cache's latent rows and rotary keys [1, 1, m, ...]: a form, or None
        where they are not made of these by one matrix of the module."""
        heads, rank, turned = key.shape[1], keys.shape[3], values.shape[3]
        still = key.shape[3] - turned
        if still < 1 or key.shape[2] != keys.shape[2] or not torch.equal(key[0, :, -1, still:],
                                                                         values[0, :, -1].expand(heads, -1)):
            return None
        rows = torch.tensor(sorted({0, key.shape[2] // 2, key.shape[2] - 1}), device=key.device)
        latent = keys[0, 0, rows].float()
        expected = torch.cat([key[0, :, rows, :still], value[0, :, rows]], -1).float()
        for part in module.modules():
            weight = getattr(part, "weight", None)
            if (not isinstance(weight, torch.Tensor) or weight.dtype not in FLOAT_TYPES or weight.device != key.device or
                    weight.shape != (heads * expected.shape[2], rank) or getattr(part, "bias", None) is not None):
                continue
            matrix = weight.detach().unflatten(0, (heads, -1))
            distance = float((latent @ matrix.float().transpose(1, 2) - expected).norm())
            if distance <= _ROUNDING[key.dtype] * float(expected.norm()):
                return Latent(matrix[:, :still], matrix[:, still:], turned)
        return None

    def rows(self, key, value, cached):
        latent, turned = (tensor[0, :, -key.shape[2] :] for tensor in cached)
        return torch.cat([latent, turned], -1), latent

    def queries(self, query):
        still = self._of_keys.shape[1]
        absorbed = query[0, :, :, :still].float() @ self._of_keys.float()
        return torch.cat([absorbed.to(query.dtype), query[0, :, :, still:]], -1)

    def outputs(self, output, queries, keys, values, positions, first_key, rule):
        block = max(1, _BLOCK_BYTES // (4 * keys.shape[1] * queries.shape[0]))
        parts = [plain_attention(queries[:, start : start + block], keys, values, positions[start : start + block], first_key,
                                 rule) for start in range(0, queries.shape[1], block)]
        return torch.cat(parts, 1).to(output.dtype)

    def expand(self, outputs):
        return (outputs.float() @ self._of_values.float().transpose(1, 2)).transpose(0, 1)

    def gate_fault(self, width, normed):
        if normed or width > 1:
            what = "a norm of" if normed else "a gate with a factor for each value of"
            return (f"{what} its heads' outputs stands before it, which are not what the cache's latent rows have in a trace "
                    "(MLA)")
        return None

    def projection(self, weight):
        heads, width = self._of_values.shape[:2]
        of_heads = weight.unflatten(1, (heads, width))
        absorbed = [(of_heads[:, head].float() @ self._of_values[head].float()).to(weight.dtype) for head in range(heads)]
        return torch.cat(absorbed, 1)


def form_of(module, heads, key, value, keys, values):
    """How what attention reads, [1, H, m, D], comes of what its cache holds; None where no way is known."""
    if (key.shape[1], key.shape[3], value.shape[3]) == (keys.shape[1], keys.shape[3], values.shape[3]):
        return AsCached()
    if keys.shape[1] == values.shape[1] == 1 and (key.shape[3], value.shape[3]) != (keys.shape[3], values.shape[3]):
        return Latent.find(module, key, value, keys, values)
    if (key.shape[3], value.shape[3]) == (keys.shape[3], values.shape[3]) and keys.shape[1] < key.shape[1]:
        return Copied.find(key, value, keys, values, heads)
    return None
