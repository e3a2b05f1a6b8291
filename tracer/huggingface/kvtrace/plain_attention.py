"""Attention of a few queries, computed plainly: what an implementation should have given."""

import torch


def plain_attention(queries, keys, values, positions, first_key, *, scale, softcap, window):
    """Outputs [H, r, D] in float32 of `queries` [H, r, D] at `positions` [r] over `keys` and `values` [K, m, D] at
    positions `first_key`..., causal, the last `window` keys where that is not 0."""
    group = queries.shape[0] // keys.shape[0]
    key_positions = torch.arange(first_key, first_key + keys.shape[1], device=keys.device)
    hidden = key_positions > positions[:, None]
    if window:
        hidden |= key_positions <= positions[:, None] - window
    outputs = []
    # One head of keys in float32 at a time.
    for head, (head_keys, head_values) in enumerate(zip(keys, values)):
        logits = queries[head * group : (head + 1) * group].float() @ head_keys.float().T * scale
        if softcap:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        outputs.append(torch.softmax(logits.masked_fill_(hidden, float("-inf")), -1) @ head_values.float())
    return torch.cat(outputs)
