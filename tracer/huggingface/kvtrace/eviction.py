"""Lets a Hugging Face model run on with what a policy kept of its cache."""

import contextlib
import warnings
import weakref

import torch
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import checks, interface
from .errors import EvictionError
from .kept_sets import KeptSets, read_kept_sets
from .masks import Masks
from .modules import decoder_config, decoder_of, is_innermost, numbered, visibilities
from .trace_digest import tokens_digest

# A row that a head does not see.
_HIDDEN = -1


class EvictedLayer(DynamicLayer):
    """A layer's cache of which rows are gone.

    `keys`, `values` [1, K, m, D]: of each KV head its own rows, those that it kept and those of all tokens since, in the
    order of their positions. Heads that keep fewer than others have rows that they do not see at the end of what they kept.
    `positions` [heads, m] on the CPU: the rows' positions, -1 where the head does not see the row; of each KV head, or, where
    every query head has a set of its own, of each query head.
    """

    def __init__(self, keys, values, positions, length, eviction, window):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.positions = keys, values, positions
        self.is_sliding = window is not None
        self.sliding_window = window  # None: it sees everything
        self.eviction = eviction
        self._length = length

    def update(self, key_states, value_states, *arguments, **options):
        self.eviction.check_active()
        self._forget_unseen()
        count = key_states.shape[-2]
        new = torch.arange(self._length, self._length + count).expand(self.positions.shape[0], -1)
        self.positions = torch.cat([self.positions, new], 1)
        self._length += count
        return super().update(key_states, value_states, *arguments, **options)

    def get_seq_length(self, *_):
        """How many tokens ran, so that positions stay the true ones."""
        return self._length

    def get_mask_sizes(self, query_length):
        # transformers 5.1 gives positions. What is made of it is not used: what a query sees depends on the layer and head.
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        rows = self.keys.shape[-2]
        return rows + count, self._length - rows

    def crop(self, *_):
        raise EvictionError("tokens were to be taken out of an evicted cache again, as by prompt lookup and assisted "
                            "generation; generate without")

    def seen(self, count, window):
        """Which rows the last `count` tokens see: bool [heads, count, m], or [1, count, m] where all heads see the same."""
        queries = torch.arange(self._length - count, self._length)[:, None]
        positions = self.positions[:, None]
        seen = (positions != _HIDDEN) & (positions <= queries)
        if window:
            seen &= positions > queries - window
        return seen[:1] if bool((seen == seen[:1]).all()) else seen

    def _forget_unseen(self):
        """Takes away rows that no query to come sees."""
        if self.sliding_window is None:
            return
        stays = (self.positions > self._length - self.sliding_window).any(0)
        if not bool(stays.all()):
            rows = stays.nonzero()[:, 0]
            self.positions = self.positions[:, rows]
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(2, rows), self.values.index_select(2, rows)


class evicted:
    """Lets `model` run on with what was kept of its cache, inside a `with` block.

        with kvtrace.evicted(model, "kept.h5", index=3):
            model.generate(**inputs, max_new_tokens=64)

    `kept` is a file that `kvreplay replay --kept` wrote, and `index` the number of one of its groups /kept/<index>. When the
    prompt has run up to the eviction that they are of (evict_at), each layer's cache is cut to the positions that it kept;
    what runs from then on attends to them and to everything since. Rotary positions stay those of the full run. Layers with a
    sliding window hold only what they still see.

    Where all heads of a layer keep equally many, its cache has as many rows. Otherwise it has as many as the head that keeps
    most, and a mask hides what the others do not see; where every query head has a set of its own, as many as its group's
    sets have together.

    The tokens before the eviction have to be those that the file's kept sets are of (tokens_digest). Where the file does not
    say, or the block does not see them run, a warning tells that this could not be checked.

    Works with attention by eager, sdpa and flash attention, one sequence at a time, without padding, and with transformers'
    default cache. The model's code and weights stay as they are, and everything is as before when the block ends. Caches that
    were cut in the block stay so, and can be gone on with in a block of the same object alone. Raises EvictionError, in one
    line, for what cannot be done.
    """

    def __init__(self, model, kept, index=0):
        self._checks_tokens = not isinstance(kept, KeptSets)  # who read them knows of which run they are
        self._kept = read_kept_sets(kept, index) if self._checks_tokens else kept
        config = decoder_config(model)
        self._decoder = decoder_of(model)
        self._modules = numbered(self._decoder)
        self._implementation = config._attn_implementation
        self._num_layers = config.num_hidden_layers
        self._visibilities = visibilities(config, self._num_layers)
        self._sets = self._kept.of_layers(self._num_layers)
        self._is_flash = "flash" in self._implementation
        if not self._is_flash and self._implementation not in ("eager", "sdpa"):
            raise EvictionError(f"attention by {self._implementation} cannot be evicted; load the model with "
                                "attn_implementation 'sdpa', 'eager' or 'flash_attention_2'")
        if self._checks_tokens and not self._kept.tokens_digest:
            warnings.warn(f"{self._kept.place}: does not say which tokens it is of (tokens_digest), so whether they are the "
                          "prompt's is not checked", stacklevel=2)
            self._checks_tokens = False
        self._active = False

    @property
    def kept_sets(self):
        return self._kept

    def __enter__(self):
        if self._active:
            raise EvictionError("this eviction is in use already")
        self._caches = {}  # by the attention module's identity: a reference to the cache that it was handed last
        self._masks = Masks(self._implementation)
        self._evicted = set()  # layers
        self._seen = set()  # layers whose attention was called
        self._attending_kinds = set()  # of the modules that called it
        self._ran = 0  # tokens of the longest run
        self._ids = []  # of the tokens before the eviction that ran in the block
        self._passes = 0
        self._hooks = []
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_hooks)
            for module in self._modules:
                self._hooks.append(module.register_forward_pre_hook(self._on_cache, with_kwargs=True))
            self._hooks.append(self._decoder.register_forward_pre_hook(self._on_pass, with_kwargs=True))
            interface.stand_in(self._implementation, self._modules, self._attend)
            undo.pop_all()
        self._active = True
        return self

    def __exit__(self, kind, problem, trace):
        self._active = False
        try:
            self._remove_hooks()
        finally:
            interface.leave(self._implementation, self._modules)
        if kind is None and len(self._evicted) < self._num_layers:
            self._fail_unevicted()
        return False

    def check_active(self):
        if not self._active:
            raise EvictionError("a cache that was evicted is gone on with outside of its block, where nothing hides what its "
                                "heads do not see; run inside")

    def _remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _fail_unevicted(self):
        at = self._kept.evict_at
        if self._ran < at:
            ran = f"only {self._ran} tokens ran" if self._ran else "the model did not run in the block"
            raise EvictionError(f"{self._kept.place}: the eviction is at {at}, and {ran}; the kept sets are of another prompt")
        self._check_layers()

    def _check_layers(self):
        kinds = [{type(module).__name__ for module in self._modules
                  if is_innermost(module) and module.layer_idx == number}
                 for number in range(self._num_layers)]
        seen = [int(number in self._seen) for number in range(self._num_layers)]
        reason = checks.unseen_fault(seen, kinds)
        if reason is not None:
            raise EvictionError(reason)
        for number in checks.unattended(seen, kinds, self._attending_kinds):
            raise EvictionError(f"layer {number}: has no attention that goes through transformers' attention interface; kept "
                                "sets of such models cannot be applied")

    # What the run tells.

    def _on_pass(self, decoder, arguments, options):
        if self._passes > 0:
            self._check_layers()
        self._passes += 1
        cache = _cache_among(arguments, options)
        layers = getattr(cache, "layers", None) or []
        if any(isinstance(layer, EvictedLayer) and layer.eviction is not self for layer in layers):
            raise EvictionError("the cache was evicted in another block; go on in that one, or run the prompt again")
        if self._checks_tokens:
            self._check_tokens(cache, arguments, options)
        # Where the prompt ran before the block, nothing has been looked at yet.
        cut = [self._evict(cache, number) for number in range(len(layers))]
        mask = options.get("attention_mask")
        if any(cut) and isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):
            raise EvictionError("the attention mask hides positions; run without padding")

    def _check_tokens(self, cache, arguments, options):
        """Whether those before the eviction are the kept sets', once all of them are there."""
        before = cache.get_seq_length() if cache is not None else 0
        at = self._kept.evict_at
        if before > at:
            return
        given = options.get("input_ids", arguments[0] if arguments else None)
        if before == 0:
            self._ids = []
        if isinstance(given, torch.Tensor) and before == len(self._ids) < at:
            self._ids += given[0].tolist()
        if len(self._ids) == at:
            if tokens_digest(self._ids) != self._kept.tokens_digest:
                raise EvictionError(f"{self._kept.place}: is of {self._kept.trace or 'a trace'}, which has other tokens before "
                                    "the eviction; give the kept sets of this prompt, or their index")
        elif before == at:
            warnings.warn(f"{self._kept.place}: the tokens before the eviction did not run in the block, so whether they are "
                          "those that it is of is not checked", stacklevel=2)

    def _on_cache(self, module, arguments, options):
        cache = _cache_among(arguments, options)
        if cache is not None:
            self._caches[id(module)] = weakref.ref(cache)
        else:
            self._caches.pop(id(module), None)

    def _attend(self, function, module, query, key, value, mask, *arguments, **options):
        number, count = module.layer_idx, query.shape[2]
        if type(number) is not int or not 0 <= number < self._num_layers:
            raise EvictionError(f"an attention of the model does not say which of its {self._num_layers} layers it is")
        reference = self._caches.get(id(module))
        cache = reference() if reference is not None else None
        if cache is None:
            raise EvictionError("the model runs without a cache, of which nothing can be evicted; run with use_cache=True")
        layers = getattr(cache, "layers", None) or []
        held = layers[number] if number < len(layers) else None
        if held is None or getattr(held, "keys", None) is None:
            raise EvictionError(f"layer {number}: has no keys and values of its own in the cache; kept sets of shared ones "
                                "cannot be applied")
        if query.shape[0] != 1:
            raise EvictionError(f"kept sets are of one sequence, but the batch has {query.shape[0]}; run with batch size 1 and "
                                "one beam")
        self._seen.add(number)
        self._attending_kinds.add(type(module).__name__)
        self._refuse(number, checks.options_fault(options))
        window, chunk = options.get("sliding_window") or 0, 0
        if not window:  # not all models pass it
            window, chunk = self._visibilities[number]
        if chunk:
            raise EvictionError(f"layer {number}: sees chunks of {chunk} positions; such models cannot be evicted")
        if isinstance(held, EvictedLayer):
            return self._attend_to_rest(function, held, module, query, key, value, mask, arguments, options, window)
        self._check_cache(number, held)
        length = held.get_seq_length()
        self._ran = max(self._ran, length)
        at = self._kept.evict_at
        if length - count < at < length:
            raise EvictionError(f"{self._kept.place}: the eviction is at {at}, within the piece of the prompt that runs from "
                                f"{length - count} to {length}; run {at} tokens first and what follows in the block with their "
                                "cache, or give a prompt of that length")
        if count == 1 and 1 < length < at:
            raise EvictionError(f"{self._kept.place}: the eviction is at {at}, and the prompt has only {length - 1} tokens; the "
                                "kept sets are of another prompt")
        self._refuse(number, self._masks.fault(module, mask, options, length - count, count, key.shape[2], window))
        result = function(module, query, key, value, mask, *arguments, **options)
        self._check_shape(number, held, query, key, window)
        self._evict(cache, number)
        return result

    def _attend_to_rest(self, function, held, module, query, key, value, mask, arguments, options, window):
        self._ran = max(self._ran, held.get_seq_length())
        number, count = module.layer_idx, query.shape[2]
        self._evicted.add(number)
        if self._kept.heads == "query" and query.shape[1] != held.positions.shape[0]:
            self._refuse_heads(number, query.shape[1])
        if key.shape != held.keys.shape:
            raise EvictionError(f"layer {number}: its attention reads other keys than its cache holds, of which they were made")
        if held.is_sliding and window != held.sliding_window:
            raise EvictionError(f"layer {number}: its cache keeps a sliding window of {int(held.sliding_window)}, and its "
                                f"attention sees {window or 'everything'}; such models cannot be evicted")
        seen = held.seen(count, window)
        if self._is_flash:
            return self._attend_without_masks(function, seen, module, query, key, value, arguments, options)
        # With a mask that hides nothing some implementations take another way, whose numbers differ in the last bits.
        if mask is not None or count > 1 or not bool(seen.all()):
            heads = query.shape[1]
            mask = seen if seen.shape[0] == 1 else seen.repeat_interleave(heads // seen.shape[0], 0)
            mask = mask[None].to(query.device)
            if self._implementation == "eager":  # which adds it
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)
        return function(module, query, key, value, mask, *arguments, **options)

    def _attend_without_masks(self, function, seen, module, query, key, value, arguments, options):
        """Flash attention knows no masks, and of fewer queries than keys shows the last query all keys, the one before it all
        but the last, and so on. So heads that see other rows than the rest are called apart, with the rows that they see, and
        so are queries where what they see is not that."""
        options = {**options, "sliding_window": None}
        count, rows, heads = query.shape[2], key.shape[2], query.shape[1]
        kept = rows - count
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        whole = bool((seen[:, :, kept:] == causal).all()) and bool((seen[:, :, :kept] == seen[:, :1, :kept]).all())
        if whole and bool(seen[:, -1].all()):
            return function(module, query, key, value, None, *arguments, **options)
        group, apart = heads // key.shape[1], heads // seen.shape[0]
        pieces = [slice(0, count)] if whole else [slice(at, at + 1) for at in range(count)]
        outputs = []
        for piece in pieces:
            of_heads = []
            for head, rows_seen in enumerate(seen[:, piece.stop - 1]):
                chosen = rows_seen.nonzero()[:, 0].to(key.device)
                queries = slice(head * apart, (head + 1) * apart)
                keys = slice(queries.start // group, (queries.stop - 1) // group + 1)
                of_queries = {name: options[name].reshape(-1)[queries] for name in ("s_aux", "sinks")
                              if options.get(name) is not None}
                of_heads.append(function(module, query[:, queries, piece], key[:, keys].index_select(2, chosen),
                                         value[:, keys].index_select(2, chosen), None, *arguments,
                                         **{**options, **of_queries})[0])
            outputs.append(torch.cat(of_heads, 2))
        return torch.cat(outputs, 1), None

    # The eviction.

    def _evict(self, cache, number):
        """Cuts a layer's cache to what was kept, where its run has come to the eviction; whether it has."""
        held = cache.layers[number] if number < len(cache.layers) else None
        if held is None or isinstance(held, EvictedLayer) or getattr(held, "keys", None) is None:
            return False
        if held.get_seq_length() < self._kept.evict_at:
            return False
        if held.get_seq_length() > self._kept.evict_at:
            raise EvictionError(f"{self._kept.place}: the eviction is at {self._kept.evict_at}, and the cache holds "
                                f"{held.get_seq_length()} tokens already")
        self._check_cache(number, held)
        window = int(held.sliding_window) if isinstance(held, DynamicSlidingWindowLayer) else None
        with torch.no_grad():
            cache.layers[number] = self._cut(held, number, window)
        self._evicted.add(number)
        return True

    def _cut(self, held, number, window):
        keys, values = held.keys, held.values
        heads = keys.shape[1]
        length = held.get_seq_length()
        first = length - keys.shape[2]  # position that the cache's first row is of
        sets = [torch.from_numpy(positions[positions >= first]).long() for positions in self._sets[number]]
        if len(sets) % heads or self._kept.heads == "kv" and len(sets) != heads:
            self._refuse_heads(number, heads)
        group = len(sets) // heads  # sets of each KV head
        rows = [torch.unique(torch.cat(sets[head * group : (head + 1) * group])) for head in range(heads)]
        most = max(len(positions) for positions in rows)
        chosen = torch.zeros(heads, most, dtype=torch.long)
        seen = torch.full((len(sets), most), _HIDDEN)
        for head, positions in enumerate(rows):
            chosen[head, : len(positions)] = positions - first
            for each in range(head * group, (head + 1) * group):
                seen[each, : len(positions)] = torch.where(torch.isin(positions, sets[each]), positions, _HIDDEN)
        index = chosen.to(keys.device)[None, :, :, None]
        return EvictedLayer(keys.gather(2, index.expand(-1, -1, -1, keys.shape[3])),
                            values.gather(2, index.expand(-1, -1, -1, values.shape[3])), seen, length, self, window)

    def _check_cache(self, number, held):
        if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise EvictionError(f"layer {number}: its cache ({type(held).__name__}) cannot be cut; use transformers' default "
                                "cache (DynamicCache)")

    def _check_shape(self, number, held, query, key, window):
        """Before anything is evicted, too: a long prompt should not run in vain."""
        sets, heads = len(self._sets[number]), held.keys.shape[1]
        if key.shape[1] != heads or key.shape[3] != held.keys.shape[3]:
            raise EvictionError(f"layer {number}: its attention reads {key.shape[1]} heads of keys, and the cache holds {heads} "
                                "of which they were made; kept sets of such models cannot be applied")
        if sets != (heads if self._kept.heads == "kv" else query.shape[1]):
            self._refuse_heads(number, heads if self._kept.heads == "kv" else query.shape[1])
        if isinstance(held, DynamicSlidingWindowLayer) and window != int(held.sliding_window):
            raise EvictionError(f"layer {number}: its cache keeps a sliding window of {int(held.sliding_window)}, and its "
                                f"attention sees {window or 'everything'}; such models cannot be evicted")

    def _refuse_heads(self, number, heads):
        kind = "KV" if self._kept.heads == "kv" else "query"
        raise EvictionError(f"{self._kept.place}: holds {len(self._sets[number])} sets for each of {self._num_layers} layers, "
                            f"and layer {number} of the model has {heads} {kind} heads; the kept sets are of another model")

    def _refuse(self, number, reason):
        if reason is not None:
            raise EvictionError(f"layer {number} cannot be captured, and so not be evicted: {reason}")


def _cache_among(arguments, options):
    cache = next((value for value in (*arguments, *options.values()) if isinstance(value, transformers.Cache)), None)
    return getattr(cache, "self_attention_cache", cache)
