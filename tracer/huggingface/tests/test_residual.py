"""Norms of the residual stream, and of the norms that stand before it, against hooks that know the models' own names."""

import subprocess

import check_architectures as architectures
import h5py
import numpy as np
import pytest
import torch
from conftest import FAMILIES, distance, generate, load, prompt_of

import kvtrace


def layers_of(model):
    return (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).layers


# What x enters: where attention and MLP are added together, the layer itself.
PLACES = {
    "llama": lambda layer: layer.post_attention_layernorm, "qwen3": lambda layer: layer.post_attention_layernorm,
    "phi3": lambda layer: layer.post_attention_layernorm, "gemma2": lambda layer: layer.pre_feedforward_layernorm,
    "gemma3": lambda layer: layer.pre_feedforward_layernorm, "olmo2": lambda layer: layer.mlp,
    "gpt_neox": lambda layer: layer, "cohere": lambda layer: layer,
}
# By how much the stored weight of the norm behind the projection is less than what it multiplies by.
NORMS = {"gemma2": 1, "gemma3": 1, "olmo2": 0}


def build(name, dtype=torch.float32):
    """A tiny model, and its prompt."""
    if (FAMILIES / name).is_dir():
        return load(name, dtype=dtype), prompt_of(name)
    return architectures.build(name, "eager").to(dtype), architectures.inputs(name)["input_ids"]


def entering(modules, run):
    """What enters each of the modules in a run, [T, C] in float64."""
    given = [[] for _ in modules]
    hooks = [module.register_forward_pre_hook(lambda _, arguments, options, rows=rows: rows.append(
        (arguments[0] if arguments else options["hidden_states"]).detach()[0].double()), with_kwargs=True)
        for module, rows in zip(modules, given, strict=True)]
    run()
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows).numpy() for rows in given]


def captured(model, ids, output, **options):
    """By layer: residual_norm, the norm's weight or None, and its epsilon."""
    with kvtrace.capture(model, output, **options):
        generate(model, ids)
    with h5py.File(output) as file:
        found = []
        for number in range(len(layers_of(model))):
            group = file[f"layers/{number}"]
            norm = group.get("projection_output_norm")
            found.append((group["residual_norm"][:], None if norm is None else norm[:],
                          None if norm is None else float(norm.attrs["epsilon"])))
            assert group["residual_norm"].dtype == np.float32
        return found, file["query_positions"][:]


@pytest.mark.parametrize("queries", ["all", "window:9"])
@pytest.mark.parametrize("name", PLACES)
def test_norms_are_those_of_what_enters_the_mlp_or_its_norm(name, queries, output):
    model, ids = build(name)
    alone = generate(model, ids)
    states = entering([PLACES[name](layer) for layer in layers_of(model)], lambda: generate(model, ids))
    found, positions = captured(model, ids, output, queries=queries)
    assert generate(model, ids).tolist() == alone.tolist()
    for layer, expected, (norms, weight, epsilon) in zip(layers_of(model), states, found, strict=True):
        assert np.allclose(norms, np.linalg.norm(expected[positions], axis=1), rtol=1e-5)
        if name not in NORMS:
            assert weight is None
            continue
        norm = layer.post_attention_layernorm
        assert np.allclose(weight, NORMS[name] + norm.weight.detach().numpy())
        assert epsilon == (norm.variance_epsilon if name == "olmo2" else norm.eps)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "olmo2"])
def test_trace_explains_the_residual_stream(name, output):
    """Outputs through projection and norm, added to the layer's input, have the norms that are stored."""
    model, ids = build(name)
    before = entering(list(layers_of(model)), lambda: generate(model, ids))
    found, _ = captured(model, ids, output)
    with h5py.File(output) as file:
        for number, (states, (norms, weight, epsilon)) in enumerate(zip(before, found, strict=True)):
            outputs = file[f"layers/{number}/outputs"][:].astype(np.float64)
            added = outputs.transpose(1, 0, 2).reshape(len(states), -1) @ file[f"layers/{number}/output_projection"][:].T
            bias = getattr(layers_of(model)[number].self_attn.o_proj, "bias", None)
            added += bias.detach().numpy() if bias is not None else 0
            if weight is not None:
                added *= weight / np.sqrt((added**2).mean(1, keepdims=True) + epsilon)
            assert distance(norms, np.linalg.norm(states + added, axis=1)) < 1e-5


@pytest.mark.parametrize("name", PLACES)
def test_short_types_and_prompts_in_pieces(name, tmp_path):
    model, ids = build(name)
    whole, _ = captured(model, ids, tmp_path / "whole.h5")
    with kvtrace.capture(model, tmp_path / "pieces.h5"):
        generate(model, ids, prefill_chunk_size=13)
    with h5py.File(tmp_path / "pieces.h5") as file:
        for number, (norms, *_) in enumerate(whole):
            assert distance(file[f"layers/{number}/residual_norm"][:], norms) < 1e-5
    model, ids = build(name, torch.bfloat16)
    states = entering([PLACES[name](layer) for layer in layers_of(model)], lambda: generate(model, ids))
    short, _ = captured(model, ids, tmp_path / "short.h5")
    for expected, (norms, weight, _) in zip(states, short, strict=True):
        assert np.allclose(norms, np.linalg.norm(expected, axis=1), rtol=1e-5)
        assert (weight is not None) == (name in NORMS)


def goes_without(model, ids, output, match):
    with pytest.warns(UserWarning, match=f"goes without norms of the residual stream{match}"):
        with kvtrace.capture(model, output):
            generate(model, ids)
    with h5py.File(output) as file:
        return ["residual_norm" in layer for layer in file["layers"].values()]


def test_left_out_where_something_else_is_added(output):
    """Granite multiplies what it adds, so that the trace's projection would not give the stream's error."""
    model = architectures.build("granite", "eager")
    for layer in layers_of(model):
        layer.residual_multiplier = 0.5
    ids = architectures.inputs("granite")["input_ids"]
    assert not any(goes_without(model, ids, output, ": no part of it .GraniteDecoderLayer. is given the residual stream"))


def test_left_out_behind_a_norm_that_is_none(output):
    model, ids = load("gemma2"), prompt_of("gemma2")
    width = model.config.hidden_size
    layers_of(model)[1].post_attention_layernorm = torch.nn.LayerNorm(width)
    assert goes_without(model, ids, output, " in layer 1: what the attention gives goes through LayerNorm") == [
        True, False, True]


def test_left_out_where_single_tokens_take_another_way(output):
    model, ids = load("llama"), prompt_of("llama")
    attention = layers_of(model)[0].self_attn

    def other(_, arguments, result):
        return (result[0] * 1.5, result[1]) if result[0].shape[1] == 1 else None

    with pytest.warns(UserWarning, match="goes without norms of the residual stream in layer 0: no part of it"):
        with kvtrace.capture(model, output):
            # Behind the hook that looks at what attention gives.
            hook = attention.register_forward_hook(other)
            generate(model, ids)
    hook.remove()
    with h5py.File(output) as file:
        assert ["residual_norm" in layer for layer in file["layers"].values()] == [False, True]


def test_nothing_that_runs_after_is_looked_at(output):
    """Only x is, from the second token that runs alone on."""
    model, ids = load("gemma2"), prompt_of("gemma2")
    with kvtrace.capture(model, output):
        generate(model, ids, 5)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in layers_of(model)[0].modules()
                 if module is not layers_of(model)[0].self_attn]
        assert sum(hooks) == 1


@pytest.mark.parametrize("name", PLACES)
def test_kvreplay_holds_errors_against_it(name, kvreplay, output, tmp_path):
    model, ids = build(name)
    captured(model, ids, output, attention_mass=True)
    result = subprocess.run([kvreplay, "inspect", output], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
    assert "residual_norm" in result.stdout
    replayed = subprocess.run([kvreplay, "replay", output, "--policy", "recent", "--capacity", "7", "-o",
                               tmp_path / "results.h5", "--kept", tmp_path / "kept.h5"], capture_output=True, text=True)
    assert replayed.returncode == 0, replayed.stderr
    with h5py.File(output) as trace, h5py.File(tmp_path / "results.h5") as file:
        found, positions = file["results/0/residual_error"][:], file["evaluation_positions"][:]
        assert found.shape == (len(layers_of(model)), len(positions))
        for number, errors in enumerate(found):
            expected = residual_errors(trace, number, positions, ids.shape[1], 7)
            assert np.allclose(errors, expected, rtol=1e-4, atol=1e-6), number


def residual_errors(trace, number, positions, evict_at, capacity):
    """What the layer adds to the residual stream where the last `capacity` positions before the eviction are left, less what it
    adds with all, over the stream's norm: of the queries at `positions`."""
    group, model = trace[f"layers/{number}"], trace["model"].attrs
    window = int(group.attrs.get("sliding_window", model["sliding_window"]))
    keys, values = (group[name][:].astype(np.float64) for name in ("keys", "values"))
    rows = positions - trace["query_positions"][0]
    queries = group["queries"][:].astype(np.float64)[:, rows]
    shared = queries.shape[0] // keys.shape[0]
    logits = queries @ np.repeat(keys, shared, 0).transpose(0, 2, 1) * model["softmax_scale"]
    cap = model["attn_logit_softcapping"]
    logits = cap * np.tanh(logits / cap) if cap else logits
    columns = np.arange(keys.shape[1])
    seen = columns <= positions[:, None]
    if window:
        seen &= columns > positions[:, None] - window
    weight = group["output_projection"][:].astype(np.float64)
    norm = group.get("projection_output_norm")

    def added(visible):
        weights = np.exp(np.where(visible, logits, -np.inf))
        outputs = weights / weights.sum(-1, keepdims=True) @ np.repeat(values, shared, 0)
        projected = outputs.transpose(1, 0, 2).reshape(len(positions), -1) @ weight.T
        if norm is not None:
            projected *= norm[:] / np.sqrt((projected**2).mean(1, keepdims=True) + norm.attrs["epsilon"])
        return projected

    difference = added(seen & (columns >= evict_at - capacity)) - added(seen)
    return np.linalg.norm(difference, axis=1) / group["residual_norm"][:][rows]
