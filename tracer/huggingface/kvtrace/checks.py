"""What a run has to be for a trace to tell the truth about it.

Every check returns None where that is so, and else the reason in words. Arrays may be PyTorch's or NumPy's: this file
needs neither.
"""

import math

# What models hand to their attention beside queries, keys, values and mask that a trace holds, or that decides only what
# a model returns.
_KNOWN_OPTIONS = frozenset((
    "cache", "cache_params", "cache_position", "deterministic", "dropout", "is_causal", "layer_idx", "logits_to_keep",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "past_key_value",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "s_aux", "scaling", "sinks", "sliding_window",
    "softcap", "use_cache"))
_REASONS = {
    "block_indices": "reads only the blocks of keys that the model chose (block_indices)",
    "cu_seq_lens_k": "reads several sequences packed into one (cu_seq_lens_k); run one alone",
    "cu_seq_lens_q": "reads several sequences packed into one (cu_seq_lens_q); run one alone",
    "indices": "reads only the keys that the model chose (indices)",
    "max_length_k": "reads several sequences packed into one (max_length_k); run one alone",
    "max_length_q": "reads several sequences packed into one (max_length_q); run one alone",
    "position_bias": "adds a bias of positions to its logits (position_bias), which a trace has no place for",
}

# Logits that are this much lower get no weight in any of the types.
_HIDDEN = -1e4


def options_fault(options):
    """Of what attention was given by name; None stands for an option that was not given."""
    given = sorted(name for name, value in options.items() if value is not None and name not in _KNOWN_OPTIONS)
    for name in given:
        if name in _REASONS:
            return f"its attention {_REASONS[name]}"
    if given:
        return f"its attention is given {given[0]}, of which is not known what it computes with it"
    return None


def mask_fault(mask, queries, keys, window, chunk=0):
    """Of a mask [heads, n, m], True or 0 where a query sees a key and False or very negative where it does not, for
    queries at the positions [n, 1] and keys at [m]: each should see those up to itself, the last `window` of them, and
    those of its own chunk of `chunk` positions, where that is not 0."""
    if str(mask.dtype).endswith("bool"):
        seen = mask
    else:
        seen = mask == 0
        if not bool((seen | (mask <= _HIDDEN)).all()):
            return "its mask adds to logits instead of hiding positions, which a trace has no place for"
    expected = keys <= queries
    if window:
        expected = expected & (keys > queries - window)
    if chunk:
        expected = expected & (keys >= queries // chunk * chunk)
    if bool((seen == expected).all()):
        return None
    if bool((seen != seen[:1]).any()):
        return "its mask shows different positions to different heads"
    positions = [int(query) for query in queries[:, 0]]
    rows = [[int(key) for key, one in zip(keys, row) if one] for row in seen[0]]
    for query, row in zip(positions, rows):
        if row and row[-1] > query:
            return (f"its mask shows position {row[-1]} to the query at {query}, which comes before it, as with images "
                    "whose tokens see each other; a trace holds causal attention")
    for query, row in zip(positions, rows):
        if window and row and row[0] <= query - window or chunk and row and row[0] < query // chunk * chunk:
            outside = f"its sliding window of {window}" if window else f"its chunk of {chunk}"
            return (f"its mask shows position {row[0]} to the query at {query}, which is outside {outside} that the model's "
                    "configuration gives it")
    return _hidden_fault(positions, rows, int(keys[0]), window)


def _hidden_fault(positions, rows, first_key, window):
    """Of queries at `positions` that see the positions in `rows`, none of them later, and not all that they should."""
    starts = [row[0] if row else query + 1 for query, row in zip(positions, rows)]
    if all(len(row) == query + 1 - start for query, start, row in zip(positions, starts, rows)):
        span = positions[-1] + 1 - starts[-1]
        several = len(positions) > 1
        if not several and window and span == window - 1:
            return (f"its mask shows the last {span} positions to the query at {positions[-1]}, one less than its sliding "
                    "window holds. transformers 5.1 and 5.2 do that where prefill_chunk_size is given; run the prompt in one "
                    "piece, or with another version")
        if several and all(start == max(first_key, query + 1 - span) for query, start in zip(positions, starts)):
            passed = f" (that is {window})" if window else ""
            return (f"its mask shows the last {span} positions, a sliding window that neither an option of its attention nor "
                    f"the model's configuration gives it{passed}")
        chunk = math.gcd(*starts)
        if len(set(starts)) > 1 and all(start == query // chunk * chunk for query, start in zip(positions, starts)):
            return f"its mask shows chunks of {chunk} positions, which the model's configuration does not give it"
        if all(start == starts[-1] for start, row in zip(starts, rows) if row):
            return (f"its mask hides the positions before {starts[-1]} from the query at {positions[-1]}; run without padding")
    return ("its mask hides positions between those that it shows, as attention that chooses its keys does, which a trace "
            "has no place for; if that is padding, run without padding")


def no_mask_fault(implementation, is_causal, count, length, window, chunk=0, first=0):
    """Of attention without a mask, for the `count` positions from `first` on and the last `length`: what the implementation
    shows then. Those that are not transformers' own are taken at their word, but for chunks, of which they are not told."""
    if count > 1 and not is_causal:
        return "its attention is not causal"
    end = first + count
    if chunk and (end - 1) // chunk * chunk > end - length:
        return f"its attention has no mask that would hide what lies outside its chunk of {chunk}"
    if implementation not in ("eager", "sdpa"):
        return None
    if count > 1 and (implementation == "eager" or length != count):
        return "its attention has no mask, so that its queries see later positions"
    if window and length > window:
        return f"its attention has no mask that would hide what lies outside its sliding window of {window}"
    return None


def cache_fault(attention, cached, length, held):
    """Of the widths ((heads, width) of keys, of values) that attention reads and that its cache holds, and of the number
    of positions that both should have and that the cache has."""
    if attention == cached and length == held:
        return None
    (heads, key_width), (_, value_width) = attention
    (cached_heads, cached_width), (cached_value_heads, cached_value_width) = cached
    if cached_heads == cached_value_heads == 1 < heads and (key_width, value_width) != (cached_width, cached_value_width):
        return (f"its cache holds one latent row of {cached_width} and {cached_value_width} values for each token (MLA), and "
                f"what its {heads} heads read is not made of it by one matrix alone; such latent attention cannot be captured")
    if attention != cached:
        return (f"its attention reads {heads} heads of keys ({key_width} wide) and values ({value_width}), but the cache "
                f"holds {cached_heads} ({cached_width}) and {cached_value_heads} ({cached_value_width}), of which they were "
                "made; a trace holds the cache's")
    return (f"its attention reads {length} keys, of which the cache holds {held}: another cache than transformers' default "
            "(DynamicCache), which cannot be captured")


def parts_fault(kinds, reason):
    """`reason`, why a trace cannot hold what an attention reads, by what its masks and keys look like, or a better one by the
    kinds of modules that it and its parts are."""
    for what, looks, better in (
            ("CrossAttention", "", "reads other states than those of the tokens, such as an image's ({})"),
            ("Compressor", "attention reads", "reads keys of several tokens together beside those of single ones ({})"),
            ("Indexer", "hides positions between", "reads only the keys that the model chooses ({})")):
        named = next((kind for kind in sorted(kinds) if what in kind), None)
        if named is not None and looks in reason:
            return f"its attention {better.format(named)}, which a trace has no place for"
    return reason


def positions_fault(positions, previous=None):
    """Of the positions of a piece of the run, as the model was told them; `previous`: the last one of the piece before."""
    for position in positions:
        if previous is not None and position != previous + 1:
            return (f"position {position} comes after {previous}: the pieces of the run are not at consecutive positions. "
                    "transformers 5.2 does that where prefill_chunk_size is given; run the prompt in one piece, or with "
                    "another version")
        previous = position
    return None


def length_fault(first, count, length, window, original_length):
    """Of attention that reads `length` keys where the trace has `first` positions and `count` come in.

    `original_length`: beyond which the model's rotary embedding changes (longrope), or None.
    """
    end = first + count
    if length == end or (window and length == min(first, window - 1) + count):
        return None
    if length == count:
        if original_length is not None and first <= original_length < count:
            return (f"its rotary embedding changes beyond {original_length} tokens (longrope), where generate() throws the "
                    "cache away and runs everything again; a trace holds one run, so end it before or begin beyond")
        return ("a second run began, or one without a cache; a trace holds one run, so use a block for each, with "
                "use_cache=True")
    if count < length < end and not window:
        return (f"{end - length} of the tokens that ran were taken out of the cache again, as by prompt lookup and assisted "
                "generation; a trace holds what stays, so generate without")
    return f"attention reads {length} keys after {end} tokens; use transformers' default cache (DynamicCache)"


def unseen_fault(tokens, kinds):
    """Of the tokens at which each layer was seen, and the kinds of modules in each layer that could have been seen."""
    if any(tokens):
        return None
    names = _listed(sorted(set().union(*kinds)))
    if not any("attention" in kind.lower() for kind in set().union(*kinds)):
        return f"it has no attention{f' (its layers have {names})' if names else ''}, and a trace holds what attention saw"
    return ("none of its layers calls transformers' attention interface" + (f" (they are {names})" if names else "") +
            "; only attention that goes through it can be recorded")


def unattended(tokens, kinds, attending):
    """The layers that were not seen and have no module of a kind in `attending`, those that called attention: they have no
    attention, or one of their own."""
    return [number for number, count in enumerate(tokens) if count == 0 and not set(kinds[number]) & set(attending)]


def unseen_cache_fault(keys, kinds):
    """Of a layer that was not seen, and what caches hold as its keys (None: nothing)."""
    if all(some is None or some.shape[-1] == 0 or some.shape[-2] == 0 for some in keys):
        return None
    names = _listed(sorted(kinds))
    return (f"its keys are in the cache, but its attention{f' ({names})' if names else ''} does not go through transformers' "
            "attention interface; only attention that does can be recorded")


def _listed(names, most=6):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
