"""Of one tiny model of every kind of attention: what the trace alone gives, computed plainly, is what the model's own
attention block gave, with the prompt in one piece and in several, and of what was generated. The modules are found here by
the models' own names."""

import dataclasses
import subprocess

import check_architectures as architectures
import h5py
import numpy as np
import pytest
import torch
from conftest import distance
from plain_trace import read_layers

import kvtrace

PIECES = 13
IN_ONE_PIECE = {"recurrent_gemma"}  # what it returns has no cache


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of a tiny model's trace is to be expected."""

    attending: tuple  # layers
    projection: str = "self_attn.o_proj"  # of a layer
    layers: str = "model.layers"
    tensors: tuple = ()  # that its layers have beside those of all
    some: bool = False  # only some of its layers have them
    cache_of: dict = dataclasses.field(default_factory=dict)
    sees: tuple = ()  # what of each attending layer hides positions
    gate_width: int = 0  # factors of a head's output
    shapes: tuple = ()  # of each attending layer, where they differ: H, K, Dk, Dv


KINDS = {
    "llama": Kind((0, 1, 2, 3)),
    # Layers that do not attend.
    "bamba": Kind((1, 3)), "jamba": Kind((1, 3)), "lfm2": Kind((1, 3), "self_attn.out_proj"), "mllama": Kind((0, 2, 3)),
    "nemotron_h": Kind((1, 3), "mixer.o_proj", "model.layers"), "olmo_hybrid": Kind((1, 3)),
    "recurrent_gemma": Kind((1, 3), "temporal_block.o_proj"),
    # Learned sinks.
    "flint": Kind((0, 1, 2, 3), tensors=("sinks",)), "gpt_oss": Kind((0, 1, 2, 3), tensors=("sinks",)),
    "granite_swa": Kind((0, 1, 2, 3), tensors=("sinks",)),
    "mimo_v2_flash": Kind((0, 1, 2, 3), tensors=("sinks",), some=True,
                          shapes=((4, 2, 16, 16), (4, 4, 16, 16), (4, 4, 16, 16), (4, 4, 16, 16))),
    # Gates and norms between outputs and projection.
    "afmoe": Kind((0, 1, 2, 3), tensors=("output_gate",), gate_width=16),
    "beam": Kind((0, 1, 2, 3), tensors=("output_gate",), gate_width=16),
    "laguna": Kind((0, 1, 2, 3), tensors=("output_gate",), gate_width=1),
    "lfm3": Kind((2,), tensors=("output_gate",), gate_width=1),
    "qwen3_next": Kind((1, 3), tensors=("output_gate",), gate_width=16),
    "qwen3_5_text": Kind((1, 3), tensors=("output_gate",), gate_width=16),
    "bitnet": Kind((0, 1, 2, 3), tensors=("projection_norm",)),
    # Projections that are transposed, or in another module.
    "gpt2": Kind((0, 1, 2, 3), "attn.c_proj", "transformer.h"),
    "gpt_bigcode": Kind((0, 1, 2, 3), "attn.c_proj", "transformer.h"),
    "bert": Kind((0, 1, 2, 3), "attention.output.dense", "bert.encoder.layer"),
    # Latent attention, in two with layers that do not attend, in one of those with a gate.
    **{name: Kind((0, 1, 2, 3), shapes=((4, 1, 32, 24),) * 4) for name in (
        "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu")},
    "longcat_flash": Kind((0, 1, 2, 3), shapes=((4, 1, 32, 24),) * 4),
    "kimi_linear": Kind((1, 3), shapes=((4, 1, 32, 24),) * 2),
    "bailing_hybrid": Kind((1, 3), tensors=("output_gate",), gate_width=1, shapes=((4, 1, 32, 24),) * 2),
    # Chunks, and windows that attention is not told.
    "llama4_text": Kind((0, 1, 2, 3), sees=({"attention_chunk_size": 16},) * 3 + ({},)),
    "qwen2_moe with a window": Kind((0, 1, 2, 3), sees=({"sliding_window": 24}, {}, {}, {})),
    "phimoe with a window": Kind((0, 1, 2, 3), sees=({"sliding_window": 24},) * 4),
    # Shapes of layers, and caches that several read.
    "gemma4_text": Kind((0, 1, 2, 3), cache_of={2: 0, 3: 1}, shapes=((4, 2, 16, 16), (4, 1, 32, 32)) * 2),
    "gemma3n_text": Kind((0, 1, 2, 3, 4, 5), cache_of={4: 2, 5: 3}),
}


def layers_of(name, model):
    """Its decoder layers, by number."""
    return model.get_submodule(KINDS[name].layers)


def projections_of(name, model):
    """The output projection of each attending layer, by number."""
    if name == "longcat_flash":  # two attentions in a layer
        return {2 * number + half: layer.self_attn[half].o_proj for number, layer in enumerate(model.model.layers)
                for half in range(2)}
    return {number: layers_of(name, model)[number].get_submodule(KINDS[name].projection) for number in KINDS[name].attending}


def build(name, attention, dtype):
    try:
        return architectures.build(name, attention).to(dtype)
    except ValueError as problem:
        assert attention == "sdpa" and "scaled_dot_product_attention" in str(problem)
        pytest.skip("the model knows no sdpa")


def captured(name, path, dtype=torch.float32, attention="eager", **options):
    """The model, its layers in the trace, and what each one's projection gave, [T, C]."""
    model, given = build(name, attention, dtype), architectures.inputs(name)
    results = {}

    def listen(number, projection):
        def note(module, arguments, result):
            bias = getattr(module, "bias", None)
            rows = result if bias is None else result - bias
            results.setdefault(number, []).append(rows.detach()[0].double())
        return projection.register_forward_hook(note)

    hooks = [listen(*each) for each in projections_of(name, model).items()]
    alone = architectures.generate(model, given, **options).sequences
    results.clear()
    with kvtrace.capture(model, path, attention_mass=True, prompt_length=architectures.PROMPT):
        run = architectures.generate(model, given, **options)
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert run.sequences.tolist() == alone.tolist()
    return model, read_layers(path), {number: torch.cat(rows).numpy() for number, rows in results.items()}


@pytest.mark.parametrize("pieces", [None, PIECES])
@pytest.mark.parametrize("name", KINDS)
def test_trace_gives_what_the_attention_block_gave(name, pieces, output):
    if pieces is not None and name in IN_ONE_PIECE:
        pytest.skip("the model cannot run a prompt in pieces")
    options = {} if pieces is None else {"prefill_chunk_size": pieces}
    _, layers, given = captured(name, output, **options)
    kind = KINDS[name]
    assert tuple(layers) == kind.attending
    for number, layer in layers.items():
        outputs, weights = layer.attention()
        assert distance(layer.outputs, outputs) < 1e-5
        assert layer.queries.shape[1] == given[number].shape[0] == architectures.PROMPT + architectures.GENERATED - 1
        assert distance(layer.block_output(), given[number]) < 1e-5, number
        prompt = slice(architectures.PROMPT)
        assert distance(layer.tensors["attention_mass"], weights[:, prompt].sum(1)[:, prompt]) < 1e-5
    if kind.shapes:
        assert tuple((len(layer.queries), len(layer.keys), layer.keys.shape[2], layer.values.shape[2])
                     for layer in layers.values()) == kind.shapes
    if kind.sees:
        assert tuple({name: size for name in ("sliding_window", "attention_chunk_size")
                      if (size := int(layer.attributes.get(name, 0)))} for layer in layers.values()) == kind.sees
    if kind.gate_width:
        assert all(layer.tensors["output_gate"].shape[2:] == ((kind.gate_width,) if kind.gate_width > 1 else ())
                   for layer in layers.values())
    for name in kind.tensors:
        having = [name in layer.tensors for layer in layers.values()]
        assert any(having) and (kind.some != all(having))


@pytest.mark.parametrize("name", ["deepseek_v3", "bailing_hybrid"])
def test_latent_rows_that_are_evicted_are_those_that_the_model_does_not_see(name, output):
    """In a layer alone, whose input is as before."""
    model, layers, _ = captured(name, output)
    number = max(layers)
    queries, evict_at = architectures.PROMPT + architectures.GENERATED - 1, 30
    evicted = np.zeros((queries, queries), bool)
    evicted[evict_at:, 3:evict_at:2] = True
    rows = []

    def hide(module, arguments, options):
        lowest = torch.finfo(torch.float32).min
        return arguments, {**options, "attention_mask": options["attention_mask"].masked_fill(torch.from_numpy(evicted), lowest)}

    attention = layers_of(name, model)[number].self_attn
    attention.register_forward_pre_hook(hide, with_kwargs=True)
    attention.o_proj.register_forward_hook(lambda _, arguments, result: rows.append(result[0].detach()))
    with h5py.File(output) as file, torch.no_grad():
        model(torch.from_numpy(file["tokens/ids"][:]).long()[None])
    expected, full = rows[0].double().numpy(), layers[number].block_output()
    assert distance(layers[number].block_output(evicted), expected) < 1e-5
    assert distance(full[evict_at:], expected[evict_at:]) > 0.01


def test_latent_rows_are_those_of_the_cache(output):
    model, given = build("deepseek_v3", "eager", torch.float32), architectures.inputs("deepseek_v3")
    with kvtrace.capture(model, output):
        cache = architectures.generate(model, given).past_key_values
    with h5py.File(output) as file:
        for number, held in enumerate(cache.layers):
            group = file[f"layers/{number}"]
            assert np.array_equal(group["keys"][:], torch.cat([held.keys, held.values], -1)[0].numpy())
            assert "values" not in group and group.attrs["values_in_keys"] == 24
            assert group["output_projection"].shape == (64, 4 * 24)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.cache_of])
def test_shared_caches_are_stored_once(name, output):
    _, layers, _ = captured(name, output)
    assert {number: int(layer.attributes["cache_of"]) for number, layer in layers.items() if "cache_of" in layer.attributes
            } == KINDS[name].cache_of
    with h5py.File(output) as file:
        for number in layers:
            shares = number in KINDS[name].cache_of
            assert ("keys" in file[f"layers/{number}"]) != shares and ("values" in file[f"layers/{number}"]) != shares


def test_sinks_are_the_models(output):
    model, layers, _ = captured("gpt_oss", output)
    for number, layer in layers.items():
        assert np.array_equal(layer.tensors["sinks"], layers_of("gpt_oss", model)[number].self_attn.sinks.detach().numpy())
        # Without them the outputs are others.
        del layer.tensors["sinks"]
        assert distance(layer.outputs, layer.attention()[0]) > 0.01


@pytest.mark.parametrize("queries", ["window:7", "window:45"])
def test_gates_are_those_of_the_captured_queries(queries, tmp_path):
    """Also where the end of the prompt is not known before, and the prompt comes in pieces."""
    model, given = build("qwen3_next", "eager", torch.float32), architectures.inputs("qwen3_next")
    with kvtrace.capture(model, tmp_path / "all.h5"):
        architectures.generate(model, given)
    with kvtrace.capture(model, tmp_path / "window.h5", queries=queries):
        architectures.generate(model, given, prefill_chunk_size=12)
    everything, window = read_layers(tmp_path / "all.h5"), read_layers(tmp_path / "window.h5")
    for number, layer in window.items():
        rows = slice(len(everything[number].positions) - len(layer.positions), None)
        assert layer.positions.tolist() == everything[number].positions[rows].tolist()
        assert distance(layer.tensors["output_gate"], everything[number].tensors["output_gate"][:, rows]) < 1e-5


def test_gates_are_the_models(output):
    """q_proj gives them beside the queries."""
    model, given = build("qwen3_next", "eager", torch.float32), architectures.inputs("qwen3_next")
    rows = []
    attention = model.model.layers[1].self_attn
    hook = attention.q_proj.register_forward_hook(lambda _, arguments, result: rows.append(result[0].detach()))
    with kvtrace.capture(model, output):
        architectures.generate(model, given)
    hook.remove()
    gates = torch.sigmoid(torch.cat(rows).unflatten(1, (4, 2, 16))[:, :, 1]).transpose(0, 1).numpy()
    assert distance(read_layers(output)[1].tensors["output_gate"], gates) < 1e-6


def test_norms_are_the_models(output):
    model, layers, _ = captured("bitnet", output)
    for number, layer in layers.items():
        norm = model.model.layers[number].self_attn.attn_sub_norm
        assert np.array_equal(layer.tensors["projection_norm"], norm.weight.detach().numpy())
        assert layer.epsilons["projection_norm"] == norm.variance_epsilon


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_chunks_begin_while_decoding(attention, output, monkeypatch):
    monkeypatch.setattr(architectures, "GENERATED", 30)  # beyond position 64, and so into two chunks
    _, layers, given = captured("llama4_text", output, attention=attention)
    for number, layer in layers.items():
        assert distance(layer.outputs, layer.attention()[0]) < 1e-5
        assert distance(layer.block_output(), given[number]) < 1e-5


def test_copied_heads_are_stored_once(output):
    """Those of JetMoE, of which each is copied behind all others. Its projection is one of the experts'."""
    model, given = architectures.build("jetmoe", "eager"), architectures.inputs("jetmoe")
    with pytest.warns(UserWarning, match="goes without output projections"):
        with kvtrace.capture(model, output, attention_mass=True):
            cache = architectures.generate(model, given).past_key_values
    for number, layer in read_layers(output).items():
        outputs, weights = layer.attention()
        assert np.array_equal(layer.keys, cache.layers[number].keys[0].numpy())
        assert layer.keys.shape[0] == 2 and layer.queries.shape[0] == 4
        assert distance(layer.outputs, outputs) < 1e-5
        prompt = slice(architectures.PROMPT)
        assert distance(layer.tensors["attention_mass"], weights[:, prompt].sum(1)[:, prompt]) < 1e-5


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_layers_that_share_their_attention_have_its_numbers_of_the_call(name, output):
    """And one of the cache's layers each."""
    model, given = architectures.build(name, "eager"), architectures.inputs(name)
    with kvtrace.capture(model, output):
        cache = architectures.generate(model, given).past_key_values
    layers = read_layers(output)
    assert tuple(layers) == tuple(number for number, kind in enumerate(model.config.layers_block_type) if kind == "hybrid")
    for number, layer in layers.items():
        assert distance(layer.keys, cache.layers[number].keys[0]) == 0
        assert distance(layer.outputs, layer.attention()[0]) < 1e-5
        assert "output_projection" in layer.tensors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_within_its_rounding(name, attention, output):
    if name == "jamba":
        pytest.skip("its recurrent layers know no bfloat16 without their kernels")
    _, layers, given = captured(name, output, torch.bfloat16, attention)
    for number, layer in layers.items():
        assert 1e-5 < distance(layer.outputs, layer.attention()[0]) < 0.02
        assert distance(layer.block_output(), given[number]) < 0.02


@pytest.mark.parametrize("name", KINDS)
def test_kvreplay_reads_it(name, kvreplay, output):
    captured(name, output)
    result = subprocess.run([kvreplay, "inspect", "--verify", output], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


def test_last_layers_of_a_prompt_see_all_of_it(output):
    """Where generate() would compute them for its last token alone, as those of Gemma 4 that read another's cache."""
    _, layers, _ = captured("gemma4_text", output)
    assert {layer.queries.shape[1] for layer in layers.values()} == {architectures.PROMPT + architectures.GENERATED - 1}


@pytest.mark.parametrize(("kind", "reason"), [
    ("OwnAttention", r"layer 3: its keys are in the cache, but its attention \(OwnAttention\) does not go through"),
    ("BambaAttention", "layer 3 was seen at 0 of 45 tokens; the run was cut short")])
def test_layers_whose_attention_is_not_seen_are_told_from_those_without(kind, reason, output):
    model, given = architectures.build("bamba", "eager"), architectures.inputs("bamba")
    attention = model.model.layers[3].self_attn
    attention.__class__ = type(kind, (type(attention),), {})
    forward = attention.forward

    def by_another_way(*arguments, **options):
        attention.config._attn_implementation = "sdpa"
        result = forward(*arguments, **options)
        attention.config._attn_implementation = "eager"
        return result

    attention.forward = by_another_way
    with pytest.raises(kvtrace.CaptureError, match=reason):
        with kvtrace.capture(model, output):
            architectures.generate(model, given)
