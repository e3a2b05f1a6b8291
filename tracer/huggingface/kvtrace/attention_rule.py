"""What a layer's attention computes of queries, keys and values."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRule:
    """Softmax of scaled and capped logits over the keys that a query sees."""

    softmax_scale: float
    attn_logit_softcapping: float = 0.0  # c in c·tanh(logit/c); 0: none
    sliding_window: int = 0  # keys that a query sees, its own included; 0: all before it
    attention_chunk_size: int = 0  # a query at t sees keys from ⌊t/size⌋·size on; 0: no chunks
    sinks: torch.Tensor | None = None  # float32 [H]: logits that stand in the denominator with no value

    def hidden(self, queries, keys):
        """Which of the keys at positions [m] the queries at positions [n, 1] do not see: bool [n, m]."""
        hidden = keys > queries
        if self.sliding_window:
            hidden |= keys <= queries - self.sliding_window
        if self.attention_chunk_size:
            hidden |= keys < queries // self.attention_chunk_size * self.attention_chunk_size
        return hidden

    def weights(self, products, hidden, heads):
        """Attention [h, n, m] of products of queries and keys, which are written over; `heads`: the slice of query heads
        that they are of."""
        logits = products.mul_(self.softmax_scale)
        if self.attn_logit_softcapping:
            logits.div_(self.attn_logit_softcapping).tanh_().mul_(self.attn_logit_softcapping)
        logits.masked_fill_(hidden, float("-inf"))
        if self.sinks is None:
            return torch.softmax(logits, -1)
        sinks = self.sinks[heads].to(logits.device)[:, None, None].expand(*logits.shape[:2], 1)
        return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1]
