"""What eviction does to the model itself: its next-token distributions with the full cache and with what was kept of it.

The prompt is computed once. The tokens that came after it then run as one block, given as they were, with the full cache and
with each of the evicted ones.
"""

import copy
import dataclasses
import inspect

import numpy as np
import torch

from .errors import Error
from .eviction import evicted
from .modules import decoder_config, decoder_of, weight_shapes_digest

# How far, in parts of their norm, keys that the model computes may be from the trace's: in its first layer, and in all,
# where what was computed before adds up. By whether one of both is in 16 bits.
_APART = {False: (1e-3, 5e-2), True: (6e-2, 0.3)}

# The same of the logit after the prompt, in parts of the spread of all logits.
_LOGIT_APART = 0.25

# Of logits in float64 that are looked at together.
_BLOCK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of each token after the prompt, float64 [E]."""

    kl: np.ndarray  # KL(full || evicted) of the distribution of the token that comes next, in nats
    nll: np.ndarray  # of the token that did come next, with what was kept, in nats; NaN for the last, which has none
    nll_increase: np.ndarray  # what that is more than with the full cache
    agree: np.ndarray  # 1 where both find the same token most likely, of equal ones the lowest, else 0


class LiveRun:
    """The run of a trace in the model, with its prompt computed.

    `trace`: a Trace with tokens after its prompt. Raises Error, in one line, where the model is not the trace's.
    """

    def __init__(self, model, trace):
        self._model, self._trace = model, trace
        if len(trace.ids) <= trace.prompt_length:
            trace.fail("has no tokens after the prompt, and they are what the model runs on with; capture it with "
                       "--max-new-tokens 2 or more (of kvreplay capture: --generate)")
        self._check_shape()
        device = model.get_input_embeddings().weight.device
        self._ids = torch.tensor([trace.ids], device=device)
        taken = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        with torch.no_grad():
            result = model(self._ids[:, : trace.prompt_length], use_cache=True, **only_last)
        self._cache = getattr(result, self._cache_name, None) or result.past_key_values
        self._check_keys()
        self._check_next_token(result.logits[0, -1].float())
        self._full = self._logits()
        self.full_nll = self._losses(self._full)

    @property
    def positions(self):
        """Those of the tokens after the prompt."""
        return range(self._trace.prompt_length, len(self._trace.ids))

    def evicted(self, kept):
        """The Outcome of KeptSets of the end of the prompt."""
        with evicted(self._model, kept):
            logits = self._logits()
        divergence, agreement = [], []
        rows = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
        for full, rest in zip(self._full.split(rows), logits.split(rows)):
            log_full, log_rest = (torch.log_softmax(part.double(), -1) for part in (full, rest))
            probability = log_full.exp()
            difference = torch.where(probability > 0, log_full - log_rest, 0)
            divergence.append((probability * difference).sum(-1))
            agreement.append(_most_likely(full) == _most_likely(rest))
        losses = self._losses(logits)
        # What rounding makes of two that are the same may be below 0.
        return Outcome(kl=torch.cat(divergence).clamp_min(0).cpu().numpy(), nll=losses, nll_increase=losses - self.full_nll,
                       agree=torch.cat(agreement).double().cpu().numpy())

    def _logits(self):
        """Of the tokens after the prompt, float32 [E, V]."""
        # Tensors are not written over: a cache that grows makes new ones.
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        with torch.no_grad():
            result = self._model(self._ids[:, self._trace.prompt_length :], use_cache=True, **{self._cache_name: cache})
        return result.logits[0].float()

    def _losses(self, logits):
        """Of the tokens that came next, float64 [E]; NaN for the last."""
        losses = torch.full((logits.shape[0],), float("nan"), dtype=torch.float64)
        successors = self._ids[0, self._trace.prompt_length + 1 :].to(logits.device)
        for position, successor in enumerate(successors):
            losses[position] = -torch.log_softmax(logits[position].double(), -1)[successor]
        return losses.numpy()

    def _check_shape(self):
        config, trace = decoder_config(self._model), self._trace
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        outside = next((position for position, token in enumerate(trace.ids) if not 0 <= token < vocabulary), None)
        if outside is not None:
            self._refuse(f"token id {trace.ids[outside]} at position {outside} is not in its vocabulary of {vocabulary}")
        for what, ours, theirs in (("layers", config.num_hidden_layers, trace.num_layers),
                                   ("query heads", config.num_attention_heads, trace.num_query_heads)):
            if ours != theirs:
                self._refuse(f"it has {ours} {what}, and the trace {theirs}")

        digest = weight_shapes_digest(decoder_of(self._model))
        if trace.weight_shapes_digest and digest is not None and digest != trace.weight_shapes_digest:
            self._refuse("its weights have other names or shapes")

    def _check_next_token(self, logits):
        """Keys say nothing of the last layer's other weights and of what stands behind it."""
        if self._trace.next_token is None:
            return
        token, theirs = self._trace.next_token
        if not 0 <= token < len(logits):
            self._refuse(f"token id {token} is not in its vocabulary of {len(logits)}")
        ours = float(logits[token])
        if not abs(ours - theirs) <= _LOGIT_APART * float(logits.std()):
            self._refuse(f"the logit of token {token} after the prompt is {theirs:.4g}, and its own {ours:.4g}")

    def _check_keys(self):
        trace = self._trace
        layers = getattr(self._cache, "layers", None) or []
        if len(layers) != trace.num_layers:
            self._refuse(f"its cache has {len(layers)} layers, and the trace {trace.num_layers}")
        for number, (layer, stored) in enumerate(zip(layers, trace.keys)):
            keys = getattr(layer, "keys", None)
            if keys is None or keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != (stored.shape[0], stored.shape[2]):
                shape = "no keys" if keys is None else f"keys of the shape {tuple(keys.shape[1:])}"
                self._refuse(f"its cache has {shape} in layer {number}, and the trace {stored.shape[0]} heads of "
                             f"{stored.shape[2]} values")
            first = trace.prompt_length - keys.shape[2]
            rows = [row for row, position in enumerate(trace.checked) if position >= first]
            there = torch.tensor([trace.checked[row] - first for row in rows], device=keys.device)
            ours, theirs = keys[0].index_select(1, there).float().cpu().numpy(), stored[:, rows]
            distance = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            allowed = _APART[trace.dtype != "float32" or keys.dtype.itemsize == 2][number > 0]
            if not distance <= allowed:
                self._refuse(f"the keys that it computes in layer {number} are {distance:.0%} apart from the trace's")

    def _refuse(self, reason):
        raise Error(f"the model is not the one that {self._trace.path} was captured from: {reason}")


def _most_likely(logits):
    """The lowest id of the largest logits of each row."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.max(-1, keepdim=True).values, ids, logits.shape[1]).min(-1).values
