"""How much attention every key receives from the queries of a piece of the prompt, exactly and in little memory."""

import torch

# Of logits in float32 that stand in memory at a time.
_BLOCK_BYTES = 64 << 20


def attention_mass(queries, keys, first_query, first_key, rule):
    """Attention summed over the queries: float64 [H, m] for `queries` [H, n, D] at positions `first_query`... over
    `keys` [K, m, D] at positions `first_key`..., by an AttentionRule.

    The logits and the softmax are in float32, whatever the type of the queries and keys.
    """
    heads, count, dim = queries.shape
    kv_heads, length = keys.shape[:2]
    group = heads // kv_heads
    # Two copies of the logits are in memory at once.
    block = max(1, _BLOCK_BYTES // (2 * 4 * length * group))
    key_positions = torch.arange(first_key, first_key + length, device=keys.device)
    mass = torch.zeros(heads, length, dtype=torch.float64, device=keys.device)
    for kv_head in range(kv_heads):
        head_keys = keys[kv_head].float().T
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        for start in range(0, count, block):
            part = queries[of_group, start : start + block].float()
            first = first_query + start
            positions = torch.arange(first, first + part.shape[1], device=keys.device)[:, None]
            weights = rule.weights(part @ head_keys, rule.hidden(positions, key_positions), of_group)
            mass[of_group] += weights.sum(1)
    return mass
