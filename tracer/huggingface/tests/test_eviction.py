"""A model that runs on with what was kept of its cache, against one pass over all tokens with a mask for every head."""

import contextlib
import warnings

import h5py
import numpy as np
import pytest
import torch
import transformers
import xxhash
from conftest import FAMILIES, generate, load, prompt_of
from kept_files import make_sets, write_kept
from test_families import CAPPED, WINDOWS, _plain_flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import check_architectures as architectures
import kvtrace
from kvtrace.eviction import EvictedLayer
from kvtrace.trace_digest import tokens_digest

NAMES = ["llama3", "mistral", "gemma2", "gemma3", "qwen3", "phi3"]
MORE = 5  # tokens after the prompt
KINDS = ["equal", "unequal", "query"]


def shape_of(model):
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads


def held_from(name, evict_at):
    """The first position that each layer of a family still holds at the eviction."""
    return [max(0, evict_at - window + 1) if window else 0 for window in WINDOWS[name]]


def kept_of(name, model, evict_at, kind, path):
    """A file of kept sets, and the sets of each layer's query heads."""
    layers, heads, kv_heads = shape_of(model)
    several = heads if kind == "query" else kv_heads
    sets = make_sets(layers, several, evict_at, unequal=kind != "equal", first=held_from(name, evict_at))
    write_kept(path, (sets, {"evict_at": evict_at, "heads": "query" if kind == "query" else "kv"}))
    return path, [[sets[layer * several + head * several // heads] for head in range(heads)] for layer in range(layers)]


@contextlib.contextmanager
def plainly(kept, evict_at, windows=None):
    """`windows`: of the layers, where the model does not pass them. Eager attention that shows queries from the eviction on only what was kept, and what came since."""
    def attention(module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **options):
        group = query.shape[1] // key.shape[1]
        logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * scaling
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        positions = torch.arange(query.shape[2])
        sliding_window = sliding_window or (windows[module.layer_idx] if windows else None)
        for head, positions_kept in enumerate(kept[module.layer_idx]):
            seen = positions <= positions[:, None]
            if sliding_window:
                seen = seen & (positions > positions[:, None] - sliding_window)
            left = (positions >= evict_at) | torch.isin(positions, torch.from_numpy(positions_kept).long())
            seen = seen & (left | (positions[:, None] < evict_at))
            logits[head] = logits[head].masked_fill(~seen, float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux[:, None, None].expand(-1, logits.shape[1], 1)], -1)
        weights = torch.softmax(logits, -1)[..., : len(positions)]
        return (weights @ value[0].repeat_interleave(group, 0)).transpose(0, 1)[None], None

    ALL_ATTENTION_FUNCTIONS["eager"] = attention
    yield
    del ALL_ATTENTION_FUNCTIONS["eager"]


def expected_logits(name, tokens, kept, evict_at):
    """Of the tokens from the eviction on."""
    with plainly(kept, evict_at), torch.no_grad():
        return load(name)(tokens, use_cache=False).logits[0, evict_at:]


def tokens_of(name):
    """The prompt, with something after it."""
    more = torch.randint(3, 100, (1, MORE), generator=torch.Generator().manual_seed(3))
    return torch.cat([prompt_of(name), more], 1)


def run_on(model, tokens, evict_at, pieces):
    """The logits of the tokens from the eviction on, in pieces of so many tokens, and the cache."""
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(tokens[:, :evict_at], past_key_values=cache, use_cache=True)
        logits = [model(part, past_key_values=cache, use_cache=True).logits[0]
                  for part in tokens[:, evict_at:].split(pieces, 1)]
    return torch.cat(logits), cache


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_queries_see_what_was_kept_and_what_came_since(name, kind, attention, tmp_path, monkeypatch):
    if attention == "sdpa" and name in CAPPED:
        pytest.skip("sdpa cannot cap logits")
    tokens = tokens_of(name)
    evict_at = tokens.shape[1] - MORE
    model = load(name, "sdpa" if attention == "sdpa" else "eager")
    monkeypatch.setattr(transformers.integrations.flash_attention, "_flash_attention_forward", _plain_flash)
    model.config._attn_implementation = attention
    path, kept = kept_of(name, model, evict_at, kind, tmp_path / "kept.h5")
    expected = expected_logits(name, tokens, kept, evict_at)
    full = model(tokens).logits[0, evict_at:]
    assert apart(full, expected) > 1e-3  # something is lost
    for pieces in (MORE, 1, 2):
        with kvtrace.evicted(model, path):
            logits, _ = run_on(model, tokens, evict_at, pieces)
        assert apart(logits, expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe with a window"])
def test_learned_sinks_and_windows_that_attention_is_not_told_stay(name, kind, tmp_path):
    model, tokens = architectures.build(name, "eager"), architectures.inputs(name)["input_ids"]
    evict_at = tokens.shape[1] - MORE
    layers, heads, kv_heads = shape_of(model)
    several = heads if kind == "query" else kv_heads
    windows = [24 if each == "sliding_attention" else 0 for each in model.config.layer_types]
    assert any(windows)
    first = [max(0, evict_at - 23) if window else 0 for window in windows]
    sets = make_sets(layers, several, evict_at, unequal=kind != "equal", first=first)
    path = write_kept(tmp_path / "kept.h5", (sets, {"evict_at": evict_at, "heads": "query" if kind == "query" else "kv"}))
    kept = [[sets[layer * several + head * several // heads] for head in range(heads)] for layer in range(layers)]
    with plainly(kept, evict_at, windows), torch.no_grad():
        expected = model(tokens, use_cache=False).logits[0, evict_at:]
    with kvtrace.evicted(model, path):
        logits, _ = run_on(model, tokens, evict_at, 2)
    assert apart(logits, expected) < 2e-6


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_runs_on_with_it(name, kind, tmp_path):
    model, ids = load(name, "sdpa"), prompt_of(name)
    evict_at = ids.shape[1]
    path, kept = kept_of(name, model, evict_at, kind, tmp_path / "kept.h5")
    tokens = ids
    for _ in range(8):
        # The last token of the prompt runs before the eviction, and so sees everything.
        with plainly(kept, evict_at), torch.no_grad():
            logits = load(name)(tokens, use_cache=False).logits[:, -1:]
        logits[..., model.config.eos_token_id] = float("-inf")  # which generate() is not to end with
        tokens = torch.cat([tokens, logits.argmax(-1)], 1)
    with kvtrace.evicted(model, path, index=0):
        assert generate(model, ids, 8).tolist() == tokens.tolist()
        # The same again, and in pieces.
        assert generate(model, ids, 8, prefill_chunk_size=evict_at // 3).tolist() == tokens.tolist()
    assert generate(model, ids, 8).tolist() == generate(load(name), ids, 8).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_caches_shrink(name, kind, tmp_path):
    model, tokens = load(name), tokens_of(name)
    evict_at = tokens.shape[1] - MORE
    path, kept = kept_of(name, model, evict_at, kind, tmp_path / "kept.h5")
    with kvtrace.evicted(model, path):
        _, cache = run_on(model, tokens, evict_at, 1)
    _, heads, kv_heads = shape_of(model)
    for layer, of_layer, window in zip(cache.layers, kept, WINDOWS[name], strict=True):
        assert isinstance(layer, EvictedLayer)
        group = heads // kv_heads
        rows = max(len(set(np.concatenate(of_layer[head * group : (head + 1) * group]))) for head in range(kv_heads))
        most = rows + MORE
        assert layer.keys.shape[2] == layer.values.shape[2] <= most
        assert kind == "query" or most < evict_at
        assert layer.keys.untyped_storage().nbytes() <= most * kv_heads * layer.keys.shape[3] * 4
        assert layer.get_seq_length() == tokens.shape[1]
        if not window:
            assert layer.keys.shape[2] == most
        else:
            # What the next token does not see is gone with the next token, as in the cache that is not evicted.
            assert bool((layer.positions > tokens.shape[1] - 1 - window).any(0).all())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(path.name for path in FAMILIES.iterdir()))
def test_all_kept_is_the_same_to_the_bit(name, attention, tmp_path):
    if attention == "sdpa" and name in CAPPED:
        pytest.skip("sdpa cannot cap logits")
    model, tokens = load(name, attention), tokens_of(name)
    evict_at = tokens.shape[1] - MORE
    layers, _, kv_heads = shape_of(model)
    everything = [np.arange(evict_at)] * (layers * kv_heads)
    path = write_kept(tmp_path / "kept.h5", (everything, {"evict_at": evict_at}))
    for pieces in (MORE, 1):
        expected, _ = run_on(model, tokens, evict_at, pieces)
        with kvtrace.evicted(model, path):
            logits, _ = run_on(model, tokens, evict_at, pieces)
        assert torch.equal(logits, expected)


def test_prompt_may_have_run_before(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    path, kept = kept_of("llama3", model, evict_at, "unequal", tmp_path / "kept.h5")
    with torch.no_grad():
        cache = model(tokens[:, :evict_at], use_cache=True).past_key_values
        with kvtrace.evicted(model, path):
            logits = model(tokens[:, evict_at:], past_key_values=cache, use_cache=True).logits[0]
    assert apart(logits, expected_logits("llama3", tokens, kept, evict_at)) < 2e-6


def test_kept_sets_of_other_tokens_are_refused(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    layers, _, kv_heads = shape_of(model)
    digest = tokens_digest(tokens[0, :evict_at].tolist())
    assert digest == xxhash.xxh64(tokens[0, :evict_at].numpy().astype("<i4").tobytes()).hexdigest()
    path = write_kept(tmp_path / "kept.h5",
                      (make_sets(layers, kv_heads, evict_at), {"evict_at": evict_at, "tokens_digest": digest}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with kvtrace.evicted(model, path):
            run_on(model, tokens, evict_at, 1)
            generate(model, tokens[:, :evict_at], 3, prefill_chunk_size=evict_at // 3)
    other = tokens.clone()
    other[0, 2] += 1
    message = "is of run.h5, which has other tokens before the eviction; give"
    refused(model, path, message, lambda: run_on(model, other, evict_at, 1))
    refused(model, path, message, lambda: generate(model, other[:, :evict_at], 3, prefill_chunk_size=evict_at // 3))


def test_what_cannot_be_checked_is_told(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    path, _ = kept_of("llama3", model, evict_at, "equal", tmp_path / "kept.h5")
    with pytest.warns(UserWarning, match="/kept/0: does not say which tokens it is of"):
        kvtrace.evicted(model, path)
    with h5py.File(path, "r+") as file:
        file["kept/0"].attrs["tokens_digest"] = "0" * 16
    with torch.no_grad():
        cache = model(tokens[:, :evict_at], use_cache=True).past_key_values
        with kvtrace.evicted(model, path), pytest.warns(UserWarning, match="did not run in the block"):
            model(tokens[:, evict_at:], past_key_values=cache, use_cache=True)


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_everything_is_restored(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    path, _ = kept_of("llama3", model, evict_at, "unequal", tmp_path / "kept.h5")
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    before, _ = run_on(model, tokens, evict_at, MORE)
    with pytest.raises(RuntimeError, match="on purpose"):
        with kvtrace.evicted(model, path):
            run_on(model, tokens, evict_at, MORE)
            raise RuntimeError("on purpose")
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert not hooks(model)
    after, _ = run_on(model, tokens, evict_at, MORE)
    assert torch.equal(before, after)


def test_evicted_caches_are_gone_on_with_in_their_block_alone(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    path, kept = kept_of("llama3", model, evict_at, "unequal", tmp_path / "kept.h5")
    eviction = kvtrace.evicted(model, path)
    with eviction:
        _, cache = run_on(model, tokens[:, :-1], evict_at, 1)
    with pytest.raises(kvtrace.EvictionError, match="outside of its block"):
        model(tokens[:, -1:], past_key_values=cache)
    with pytest.raises(kvtrace.EvictionError, match="evicted in another block"):
        with kvtrace.evicted(model, path):
            model(tokens[:, -1:], past_key_values=cache)


def test_evicted_caches_are_gone_on_with(tmp_path):
    model, tokens = load("llama3", "sdpa"), tokens_of("llama3")
    evict_at = tokens.shape[1] - MORE
    path, kept = kept_of("llama3", model, evict_at, "unequal", tmp_path / "kept.h5")
    eviction = kvtrace.evicted(model, path)
    with eviction:
        _, cache = run_on(model, tokens[:, :-1], evict_at, 1)
    with eviction, torch.no_grad():
        # The cache is another one for a moment: none of its layers is evicted anew.
        logits = model(tokens[:, -1:], past_key_values=cache).logits[0]
    assert apart(logits, expected_logits("llama3", tokens, kept, evict_at)[-1:]) < 2e-6


def refused(model, path, match, run, index=0):
    with pytest.raises(kvtrace.Error, match=match) as problem:
        with kvtrace.evicted(model, path, index):
            run()
    assert "\n" not in str(problem.value)
    assert not hooks(model)


@pytest.fixture
def model():
    return load("llama3", "sdpa")


@pytest.fixture
def ids():
    return prompt_of("llama3")


@pytest.fixture
def path(model, ids, tmp_path):
    return kept_of("llama3", model, ids.shape[1], "equal", tmp_path / "kept.h5")[0]


def test_runs_that_cannot_be_evicted_are_refused(model, ids, path):
    at = ids.shape[1]
    refused(model, path, "batch has 2", lambda: generate(model, ids.repeat(2, 1)))
    refused(model, path, "batch has 3", lambda: generate(model, ids, num_beams=3))
    refused(model, path, "without a cache", lambda: model(ids, use_cache=False))
    refused(model, path, "default cache", lambda: generate(model, ids, cache_implementation="static"))
    refused(model, path, f"eviction is at {at}, and only {at - 5} tokens ran; the kept sets are of another prompt",
            lambda: model(ids[:, :-5]))
    refused(model, path, f"eviction is at {at}, and the prompt has only {at - 5} tokens",
            lambda: generate(model, ids[:, :-5], 8))
    refused(model, path, f"eviction is at {at}, within the piece of the prompt that runs from 0 to {at + 3}",
            lambda: generate(model, torch.cat([ids, ids[:, :3]], 1)))
    refused(model, path, "the model did not run in the block", lambda: None)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    refused(model, path, "without padding", lambda: generate(model, ids, attention_mask=mask))
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    longer = torch.cat([mask, mask[:, -1:]], 1)
    refused(model, path, "without padding", lambda: model(ids[:, :1], attention_mask=longer, past_key_values=cache))
    refused(model, path, "taken out of an evicted cache again",
            lambda: generate(model, ids, 20, prompt_lookup_num_tokens=4))


def test_models_that_cannot_be_evicted_are_refused(model, ids, path, tmp_path):
    model.config._attn_implementation = "flex_attention"
    refused(model, path, "attention by flex_attention cannot be evicted", lambda: None)
    model.config._attn_implementation = "sdpa"
    for name, heads, reason in (("bamba", 2, "layer 0: has no attention that goes through"),
                                ("falcon", 1, "none of its layers calls"),
                                ("gemma3n_text", 2, "no keys and values of its own|other keys"),
                                ("glm4_moe_lite", 4, "heads of keys"),
                                ("llama4_text", 2, "sees chunks of 16 positions")):
        other, given = architectures.build(name, "eager"), architectures.inputs(name)
        layers, length = other.config.num_hidden_layers, given["input_ids"].shape[1]
        sets = make_sets(layers, heads, length)
        kept = write_kept(tmp_path / "other.h5", (sets, {"evict_at": length}))
        refused(other, kept, reason, lambda: architectures.generate(other, given))


def test_captures_and_evictions_do_not_mix(model, path, tmp_path):
    with pytest.raises(kvtrace.CaptureError, match="captured already, or its cache evicted"):
        with kvtrace.capture(model, tmp_path / "run.h5"):
            with kvtrace.evicted(model, path):
                pytest.fail("the block was entered")
    assert not hooks(model)


def test_wrong_files_are_refused(model, ids, tmp_path):
    layers, heads, kv_heads = shape_of(model)
    at = ids.shape[1]
    sets = make_sets(layers, kv_heads, at)

    def written(*groups, **options):
        return write_kept(tmp_path / "wrong.h5", *(groups or [(sets, {"evict_at": at})]), **options)

    def fails(path, match, index=0):
        refused(model, path, match, lambda: generate(model, ids), index)

    fails(tmp_path / "missing.h5", "missing.h5: cannot be read: No such file")
    fails(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "text.h5").write_text("kept")
    fails(tmp_path / "text.h5", "text.h5: is no HDF5 file")
    fails(written(kind="kvreplay-results"), "is no file of kept sets, but of kvreplay-results")
    fails(written(complete=None), "is unfinished")
    fails(written(version=5), "is of version 5 of the format")
    fails(written(), r"no kept sets of index 3; there are 0 \(policy-0 at 9\)", 3)
    fails(written(), "no kept sets of index -1", -1)
    fails(written((sets[:-1], {"evict_at": at})), f"holds {len(sets) - 1} sets, which the model's {layers} layers cannot share")
    fails(written((make_sets(layers, kv_heads + 1, at), {"evict_at": at})),
          f"holds {kv_heads + 1} sets for each of {layers} layers, and layer 0 of the model has {kv_heads} KV heads")
    fails(written((sets, {"evict_at": at, "heads": "query"})), f"layer 0 of the model has {heads} query heads")
    fails(written((sets, {"evict_at": at, "heads": "layer"})), "heads is 'layer', not query or kv")
    fails(written((sets, {})), "does not say where the eviction was")
    fails(written((sets, {"evict_at": at - 1})), f"set 0 is not ascending positions before the eviction at {at - 1}")
    fails(written(([sets[0][::-1], *sets[1:]], {"evict_at": at})), "set 0 is not ascending")
    fails(written(([sets[0][:0], *sets[1:]], {"evict_at": at})), "set 0 is empty")
    path = written()
    with h5py.File(path, "r+") as file:
        file["kept/0/until"] = np.full(len(file["kept/0/kept"]), 2**31 - 1, np.int32)
    fails(path, r"was evicted more than once \(until\)")
    path = written()
    with h5py.File(path, "r+") as file:
        del file["kept/0/offsets"]
    fails(path, "missing or damaged")
    path = written()
    with h5py.File(path, "r+") as file:
        file["kept/0/offsets"][1] = 10**6
    fails(path, "offsets must ascend from 0")
