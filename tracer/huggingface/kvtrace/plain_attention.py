"""Attention of a few queries, computed plainly: what an implementation should have given."""

import torch


def plain_attention(queries, keys, values, positions, first_key, rule):
    """Outputs [H, r, Dv] in float32 of `queries` [H, r, Dk] at `positions` [r] over `keys` [K, m, Dk] and `values`
    [K, m, Dv] at positions `first_key`..., by an AttentionRule."""
    group = queries.shape[0] // keys.shape[0]
    hidden = rule.hidden(positions[:, None], torch.arange(first_key, first_key + keys.shape[1], device=keys.device))
    outputs = []
    # One head of keys in float32 at a time.
    for head, (head_keys, head_values) in enumerate(zip(keys, values)):
        of_group = slice(head * group, (head + 1) * group)
        weights = rule.weights(queries[of_group].float() @ head_keys.float().T, hidden, of_group)
        outputs.append(weights @ head_values.float())
    return torch.cat(outputs)
