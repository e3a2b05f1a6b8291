"""What a trace of every family holds is what the model computed."""

import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, Trace, assert_same_traces, distance, generate, load, prompt_of

import kvtrace

NAMES = sorted(folder.name for folder in FAMILIES.iterdir())
# Those whose attention sdpa cannot compute.
CAPPED = {"gemma2", "gemma2-pattern"}
# The windows of the layers, as the families' configurations mean them.
WINDOWS = {
    "gemma": [0, 0], "gemma-other-activation": [0], "gemma2": [16, 0, 16], "gemma2-pattern": [14, 0, 14],
    "gemma3": [21, 21, 0, 21], "gemma3-layer-types": [0, 15, 0], "gemma3-old-names": [13, 13, 13, 13, 13, 0, 13],
    "llama": [0, 0], "llama-own-head": [0], "llama3": [0, 0], "mistral": [19, 19], "phi3": [23, 23], "qwen2": [0, 0],
    "qwen3": [0, 17],
}


def test_every_family_has_its_expectations():
    assert NAMES == sorted(WINDOWS)


@pytest.mark.parametrize("name", NAMES)
def test_trace_explains_the_run(name, output):
    model, ids = load(name), prompt_of(name)
    alone = generate(model, ids)
    with kvtrace.capture(model, output, attention_mass=True):
        captured = generate(model, ids)
    assert captured.tolist() == alone.tolist()
    trace = Trace(output)
    assert trace.ids.tolist() == alone[0, :-1].tolist()
    assert trace.prompt_length == ids.shape[1]
    assert trace.positions.tolist() == list(range(len(trace.ids)))
    assert trace.windows == WINDOWS[name]
    for number, layer in enumerate(trace.layers):
        outputs, mass = trace.attention(number)
        assert distance(layer["outputs"], outputs) < 2e-6
        assert distance(layer["attention_mass"], mass) < 2e-6
        weight = model.get_decoder().layers[number].self_attn.o_proj.weight
        assert np.array_equal(layer["output_projection"], weight.detach().numpy())


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_the_caches(name, output):
    model, ids = load(name), prompt_of(name)
    with kvtrace.capture(model, output):
        cache = generate(model, ids, return_dict_in_generate=True).past_key_values
    trace = Trace(output)
    for layer, cached in zip(trace.layers, cache.layers, strict=True):
        # A local layer's cache holds the last of them.
        held = cached.keys.shape[2]
        assert held > 10
        assert np.array_equal(layer["keys"][:, -held:], cached.keys[0].numpy())
        assert np.array_equal(layer["values"][:, -held:], cached.values[0].numpy())


@pytest.mark.parametrize("name", NAMES)
def test_window_of_queries_is_a_part_of_all(name, tmp_path):
    model, ids = load(name), prompt_of(name)
    with kvtrace.capture(model, tmp_path / "all.h5"):
        generate(model, ids)
    with kvtrace.capture(model, tmp_path / "window.h5", queries="window:9"):
        generate(model, ids)
    everything, window = Trace(tmp_path / "all.h5"), Trace(tmp_path / "window.h5")
    start = ids.shape[1] - 9
    assert window.positions.tolist() == list(range(start, len(window.ids)))
    for one, other in zip(everything.layers, window.layers):
        assert np.array_equal(one["queries"][:, start:], other["queries"])
        assert np.array_equal(one["outputs"][:, start:], other["outputs"])
        assert np.array_equal(one["keys"], other["keys"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CAPPED])
def test_sdpa_and_eager_give_the_same_trace(name, tmp_path):
    ids = prompt_of(name)
    for attention in ("eager", "sdpa"):
        model = load(name, attention)
        with kvtrace.capture(model, tmp_path / f"{attention}.h5", attention_mass=True):
            generate(model, ids)
    sdpa = Trace(tmp_path / "sdpa.h5")
    assert sdpa.provenance["attn_implementation"] == "sdpa"
    assert_same_traces(sdpa, Trace(tmp_path / "eager.h5"), 1e-5)


def _plain_flash(query, key, value, attention_mask, *, softmax_scale, sliding_window, softcap, is_causal, **options):
    """What flash attention computes, of [1, n, heads, D]: it has no mask to look at, but sees where it is."""
    assert attention_mask is None and is_causal and not options["dropout"]
    group = query.shape[2] // key.shape[2]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    logits = query @ key.repeat_interleave(group, 0).transpose(1, 2) * softmax_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    count, length = logits.shape[1:]
    behind = torch.arange(length - count, length)[:, None] - torch.arange(length)
    hidden = behind < 0
    if sliding_window:
        hidden |= behind >= sliding_window
    weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), -1)
    return (weights @ value.repeat_interleave(group, 0)).transpose(0, 1)[None]


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_is_recorded_through_its_own_interface(name, tmp_path, monkeypatch):
    # All of transformers' road to flash attention but the GPU kernel itself.
    monkeypatch.setattr(transformers.integrations.flash_attention, "_flash_attention_forward", _plain_flash)
    model, ids = load(name), prompt_of(name)
    for attention in ("eager", "flash_attention_2"):
        model.config._attn_implementation = attention
        with kvtrace.capture(model, tmp_path / f"{attention}.h5", queries="window:20", attention_mass=True):
            generate(model, ids)
    flash = Trace(tmp_path / "flash_attention_2.h5")
    assert flash.provenance["attn_implementation"] == "flash_attention_2"
    assert flash.windows == WINDOWS[name]
    assert_same_traces(flash, Trace(tmp_path / "eager.h5"), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_in_pieces_gives_the_same_trace(name, attention, tmp_path):
    if attention == "sdpa" and name in CAPPED:
        pytest.skip("sdpa cannot cap logits")
    model, ids = load(name, attention), prompt_of(name)
    for queries in ("all", "window:20"):
        options = {"queries": queries, "attention_mass": True}
        with kvtrace.capture(model, tmp_path / "whole.h5", **options):
            generate(model, ids)
        # A last piece of one token would be taken for the first that was generated.
        pieces = next(size for size in (7, 8, 9) if ids.shape[1] % size > 1)
        with kvtrace.capture(model, tmp_path / "pieces.h5", **options):
            generate(model, ids, prefill_chunk_size=pieces)
        assert_same_traces(Trace(tmp_path / "pieces.h5"), Trace(tmp_path / "whole.h5"), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_as_it_is(name, output):
    model, ids = load(name, dtype=torch.bfloat16), prompt_of(name)
    alone = generate(model, ids)
    with kvtrace.capture(model, output):
        result = generate(model, ids, return_dict_in_generate=True)
    assert result.sequences.tolist() == alone.tolist()
    with h5py.File(output) as file:
        for number, cached in enumerate(result.past_key_values.layers):
            dataset = file[f"layers/{number}/keys"]
            assert dataset.id.get_type().get_size() == 2
            assert dataset.id.get_type().get_fields() == (15, 7, 8, 0, 7)
            held = cached.keys.shape[2]
            assert np.array_equal(dataset[:, -held:], cached.keys[0].float().numpy())
    trace = Trace(output)
    assert trace.provenance["dtype"] == "bfloat16"
    for number, layer in enumerate(trace.layers):
        assert 1e-5 < distance(layer["outputs"], trace.attention(number)[0]) < 0.02


def test_float16_stays_as_it_is(output):
    model, ids = load("llama", dtype=torch.float16), prompt_of("llama")
    with kvtrace.capture(model, output):
        cache = generate(model, ids, return_dict_in_generate=True).past_key_values
    with h5py.File(output) as file:
        assert file["layers/0/keys"].dtype == np.float16
        assert np.array_equal(file["layers/0/keys"][:], cache.layers[0].keys[0].numpy())


def test_rope_theta_and_scale_are_the_configurations(tmp_path):
    expected = {"llama3": (500000.0, 6**-0.5), "gemma2": (10000.0, 9**-0.5), "gemma3": (1000000.0, 20**-0.5),
                "gemma3-layer-types": (500000.0, 8**-0.5)}
    for name, (theta, scale) in expected.items():
        model = load(name)
        with kvtrace.capture(model, tmp_path / "run.h5"):
            generate(model, prompt_of(name))
        trace = Trace(tmp_path / "run.h5")
        assert trace.model["rope_theta"] == theta
        assert trace.model["softmax_scale"] == pytest.approx(scale)
        assert trace.model["attn_logit_softcapping"] == (3.0 if name == "gemma2" else 0.0)


def test_committed_fixtures_are_what_the_script_makes():
    script = ROOT / "tracer/huggingface/make_model_fixtures.py"
    result = subprocess.run([sys.executable, script, "--check", FAMILIES], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_both_roads_tell_the_model_by_the_same(name, kvreplay, output, tmp_path):
    model, ids = load(name), prompt_of(name)
    with kvtrace.capture(model, output, prompt_length=ids.shape[1]):
        generate(model, ids, prefill_chunk_size=7)
    result = subprocess.run([kvreplay, "capture", "--model", FAMILIES / name, "--tokens", FAMILIES / name / "prompt.ids", "-o",
                             tmp_path / "other.h5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours, theirs = Trace(output), Trace(tmp_path / "other.h5")
    assert re.fullmatch("[0-9a-f]{16}", ours.model["weight_shapes_digest"])
    assert ours.model["weight_shapes_digest"] == theirs.model["weight_shapes_digest"]
    assert ours.next_token[0] == theirs.next_token[0]
    assert ours.next_token[1] == pytest.approx(theirs.next_token[1], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_kvreplay_finds_the_trace_sound(name, kvreplay, output):
    model = load(name)
    with kvtrace.capture(model, output, attention_mass=True):
        generate(model, prompt_of(name))
    result = subprocess.run([kvreplay, "inspect", output], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
    assert "fidelity" in result.stdout
