"""Whether attention is shown what a causal model shows it."""

import weakref

import torch

from . import checks
from .errors import CaptureError

# Of a mask's elements that are looked at together.
_BLOCK = 1 << 24


class Masks:
    """Looks at the masks of a run, once at each: most layers are handed the same one."""

    def __init__(self, implementation):
        """`implementation`: the attention's, as transformers names it."""
        self._implementation = implementation
        self._last = None  # what was looked at last, and of what run

    def fault(self, module, mask, options, first, count, length, window, chunk=0):
        """Why not every query of every head sees what causal attention with this window or chunk shows it, or None; of
        `count` queries from position `first` on, over the last `length` positions."""
        is_causal = options.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        without = checks.no_mask_fault(self._implementation, is_causal, count, length, window, chunk, first)
        if mask is None:
            return without
        run = (window, chunk, first, count, length)
        if self._last is not None and self._last[0]() is mask and self._last[1] == run:
            return None
        reason = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            hides = not bool((mask[0, -length:] != 0).all())
            reason = "its mask hides positions; run without padding" if hides else without
        else:
            heads, device, part = mask_rows(mask, count, length)
            end = first + count
            keys = torch.arange(end - length, end, device=device)
            rows = max(1, _BLOCK // (length * heads))
            for start in range(0, count, rows):
                queries = torch.arange(first + start, first + min(count, start + rows), device=device)[:, None]
                reason = reason or checks.mask_fault(part(start, start + len(queries)), queries, keys, window,
                                                     chunk)
        if reason is None:
            self._last = weakref.ref(mask), run
        return reason


def mask_rows(mask, count, length):
    """How many heads a mask of `count` queries tells apart, where it is, and a function of two numbers that gives its rows
    from one up to the other: [heads, n, length]."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[2] in (1, count) and (
            mask.shape[3] == 1 or mask.shape[3] >= length):
        whole = mask[0, :, :, :length].expand(-1, count, length)
        return whole.shape[0], mask.device, lambda start, end: whole[:, start:end]
    if hasattr(mask, "mask_mod"):  # flex attention's, which PyTorch has since 2.5
        from torch.nn.attention.flex_attention import create_mask

        heads, device = mask.shape[1], mask.kv_num_blocks.device
        return heads, device, lambda start, end: create_mask(
            lambda batch, head, query, key: mask.mask_mod(batch, head, query + start, key), 1, heads, end - start, length,
            device=device)[0]
    shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
    raise CaptureError(f"the attention's mask is a {type(mask).__name__}{shape}, of which is not known what it hides from "
                       f"{count} queries of {length} keys")
