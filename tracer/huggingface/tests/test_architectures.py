"""What models do between keys, queries and values and their output projection that a trace has no place for: none of it is
stored as something else. One model for each thing that decides; check_architectures.py looks at all of them."""

import check_architectures as architectures
import numpy as np
import pytest
import torch
import transformers
from conftest import Trace, generate, load, prompt_of
from plain_trace import read_layers
from test_capture import refused
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvtrace
from kvtrace.masks import mask_rows


def runs(name, **options):
    """A tiny model of the type, and a function that runs it."""
    model, given = architectures.build(name, "eager"), architectures.inputs(name)
    return model, lambda: architectures.generate(model, given, **options)


def between(change, layer=1):
    """A model with something between a layer's outputs and its projection."""
    model = load("llama")
    model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]),))
    return model


def test_what_outputs_are_multiplied_by_is_a_gate(output):
    model, ids = between(lambda rows: rows * 1.5), prompt_of("llama")
    with kvtrace.capture(model, output):
        generate(model, ids)
    layers = Trace(output).layers
    assert "output_gate" not in layers[0]
    assert layers[1]["output_gate"].shape == layers[1]["outputs"].shape[:2]
    assert (layers[1]["output_gate"] == 1.5).all()
    assert "output_projection" in layers[1]


def rms(rows):
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)


def written_over(rows):
    return rows.mul_(1.5)


@pytest.mark.parametrize(("change", "reason"), [
    (torch.tanh, "gives enters no module"),
    (lambda rows: rows + 1, "gives enters no module"),
    (rms, "gives enters no module"),  # in no module of its own
    (lambda rows: rows * torch.sigmoid(rows), "gives enters no module"),
    (lambda rows: rows * rows.mean(-1, keepdim=True), "gives enters no module"),
    (lambda rows: torch.nn.functional.layer_norm(rows, rows.shape[-1:]), "gives enters no module"),
    (lambda rows: rows.flip(-1), "gives enters no module"),
    (written_over, "what attention gave is written over"),
])
def test_projection_is_left_out_where_something_else_stands_before_it(change, reason, output):
    model, ids = between(change), prompt_of("llama")
    with pytest.warns(UserWarning, match=f"goes without output projections in layer 1: .*{reason}"):
        with kvtrace.capture(model, output):
            generate(model, ids)
    layers = Trace(output).layers
    assert "output_projection" in layers[0]
    assert "output_projection" not in layers[1] and "output_gate" not in layers[1]


def test_projection_is_left_out_where_it_is_not_the_only_one(output):
    """As where a gate is made of the outputs, or an adapter takes them too."""
    model, ids = load("llama"), prompt_of("llama")
    projection = model.model.layers[0].self_attn.o_proj
    attention = model.model.layers[0].self_attn
    attention.other = torch.nn.Linear(*reversed(projection.weight.shape), bias=False)
    projection.register_forward_hook(lambda _, arguments, result: result + attention.other(arguments[0]))
    with pytest.warns(UserWarning, match="in layer 0: it is not the only one that takes what attention gives|no product"):
        with kvtrace.capture(model, output):
            generate(model, ids)

    attention.gate = torch.nn.Linear(*[projection.weight.shape[1]] * 2, bias=False)
    with pytest.warns(UserWarning, match="in layer 0: it is not the only one that takes what attention gives"):
        model = between(lambda rows: rows * attention.gate(rows), layer=0)
        model.model.layers[0].self_attn.gate = attention.gate
        with kvtrace.capture(model, output):
            generate(model, ids)


@pytest.mark.parametrize(("norms", "reason"), [
    ([torch.nn.LayerNorm(64)], "goes through LayerNorm, which is no norm by the root mean square"),
    ([torch.nn.RMSNorm(64, eps=1e-6), torch.nn.RMSNorm(64, eps=1e-6)], "several norms"),
])
def test_norms_that_a_trace_has_no_place_for_are_told(norms, reason, output):
    model, ids = load("llama"), prompt_of("llama")
    attention = model.model.layers[0].self_attn
    attention.norms = torch.nn.Sequential(*norms)
    projection = attention.o_proj.forward
    width = attention.o_proj.weight.shape[1]
    for norm in norms:
        norm.weight = torch.nn.Parameter(torch.rand(width) + 0.5)
        norm.normalized_shape = (width,)
        if getattr(norm, "bias", None) is not None:
            norm.bias = torch.nn.Parameter(torch.rand(width))
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: (attention.norms(arguments[0]),))
    with pytest.warns(UserWarning, match=f"goes without output projections in layer 0: .*{reason}"):
        with kvtrace.capture(model, output):
            generate(model, ids)


def test_projection_that_changes_its_input_otherwise_is_left_out(output):
    """As quantized weights that are unpacked, and transposed ones."""
    model, ids = load("llama"), prompt_of("llama")
    projection = model.model.layers[0].self_attn.o_proj
    projection.forward = lambda hidden: torch.nn.functional.linear(hidden, 2 * projection.weight)
    with pytest.warns(UserWarning, match="in layer 0: it is no product with its weight alone"):
        with kvtrace.capture(model, output):
            generate(model, ids)


@pytest.mark.parametrize("change", [lambda rows: rows * 1.5, torch.tanh])
def test_projection_by_another_way_while_decoding_is_refused(change, output):
    model = between(lambda rows: change(rows) if rows.shape[1] == 1 else rows, layer=0)
    with pytest.raises(kvtrace.CaptureError, match="layer 0: .*, though it was otherwise with the prompt"):
        with kvtrace.capture(model, output):
            generate(model, prompt_of("llama"))


@pytest.mark.parametrize(("name", "reason"), [
    (architectures.IMAGE, "shows position 14 to the query at 11, which comes before it, as with images"),
    ("moshi", "its mask shows position 0 to the query at 24, which is outside its sliding window of 24"),
    ("doge", "its mask adds to logits"),
    ("diffllama", "layer 0: it calls attention several times for the same tokens"),
    ("hrm_text", "layer 0: it calls attention several times for the same tokens"),
    ("deepseek_v32", r"layer 0: its attention reads only the keys that the model chooses \(DeepseekV32Indexer\)"),
    ("hy_v4", r"reads only the keys that the model chooses \(HYV4Indexer\)"),
    ("deepseek_v4", r"reads keys of several tokens together .*\(DeepseekV4.*Compressor\)"),
    ("minimax_m3_vl_text with sparse layers", r"reads only the blocks of keys that the model chose \(block_indices\)"),
    ("inkling_text", "adds a bias of positions"),
    ("falcon", r"none of its layers calls transformers' attention interface \(they are FalconAttention\)"),
    ("xlnet", r"none of its layers calls transformers' attention interface \(they are XLNetRelativeAttention\)"),
    ("gpt_neo", r"none of its layers calls transformers' attention interface \(they are GPTNeoSelfAttention\)"),
    ("mamba", r"it has no attention \(its layers have MambaMixer\), and a trace holds what attention saw"),
    ("xlstm", "it has no attention, and a trace holds what attention saw"),
])
def test_what_a_trace_has_no_place_for_is_refused_for_what_it_is(name, reason, output):
    try:
        model, run = runs(name)
        refused(model, output, reason, run)
    except kvtrace.CaptureError as problem:  # before the block
        pytest.fail(str(problem))


@pytest.mark.parametrize("use_cache", [True, False])
def test_latent_attention_of_more_than_a_matrix_is_refused(use_cache, output):
    model, given = architectures.build("deepseek_v3", "eager"), architectures.inputs("deepseek_v3")
    model.model.layers[2].self_attn.kv_b_proj.register_forward_hook(lambda _, arguments, result: result + 1)
    with pytest.raises(kvtrace.CaptureError, match=r"layer 2: its cache holds one latent row of 24 and 8 values .*\(MLA\), and "
                                                   "what its 4 heads read is not made of it by one matrix"):
        with kvtrace.capture(model, output):
            model(**given, use_cache=use_cache)


@pytest.mark.parametrize(("stands", "reason"), [
    (lambda rows: rows * torch.linspace(0.5, 1.5, rows.shape[-1]), "a gate with a factor for each value of its heads' outputs"),
    (torch.nn.RMSNorm(64), "a norm of its heads' outputs"),
])
def test_latent_outputs_go_through_gates_of_heads_alone(stands, reason, output):
    model, given = architectures.build("deepseek_v3", "eager"), architectures.inputs("deepseek_v3")
    attention = model.model.layers[1].self_attn
    if isinstance(stands, torch.nn.Module):
        stands.eps = 1e-6
        attention.norm = stands
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: (stands(arguments[0]),))
    with pytest.warns(UserWarning, match=f"goes without output projections in layer 1: {reason}"):
        with kvtrace.capture(model, output):
            architectures.generate(model, given)
    layers = read_layers(output)
    assert "output_projection" in layers[0].tensors
    assert not {"output_projection", "output_gate", "projection_norm"} & set(layers[1].tensors)


class DoublingCache(transformers.DynamicCache):
    def update(self, *arguments, **options):
        return tuple(2 * states for states in super().update(*arguments, **options))


def test_keys_that_the_cache_does_not_hold_are_refused(output):
    model, ids = load("llama"), prompt_of("llama")
    refused(model, output, "layer 0: its attention reads other keys and values than its cache holds",
            lambda: model(ids, past_key_values=DoublingCache(), use_cache=True))


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "gpt_oss", "bamba", "deepseek_v3", "kimi_linear", "jetmoe"])
def test_run_without_a_cache_is_captured(name, tmp_path):
    model, given = architectures.build(name, "eager"), architectures.inputs(name)
    for use_cache in (True, False):
        with kvtrace.capture(model, tmp_path / f"{use_cache}.h5"):
            model(**given, use_cache=use_cache)
    one, other = (read_layers(tmp_path / f"{use_cache}.h5") for use_cache in (True, False))
    assert one.keys() == other.keys()
    for number in one:
        ours, theirs = one[number].tensors, other[number].tensors
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_attention_to_an_image_is_refused(output):
    """Where there is none, those layers do not attend."""
    model, given = architectures.build("mllama", "eager"), architectures.inputs("mllama")
    image = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1))
    refused(model, output, r"layer 1: its attention reads other states than those of the tokens.*\(MllamaTextCrossAttention\)",
            lambda: model(**given, cross_attention_states=image))


def per_head(mask, query):
    mask = mask.repeat(1, query.shape[1], 1, 1)
    mask[:, 3, -1, :5] = torch.finfo(mask.dtype).min
    return mask


def biased(mask, query):
    return mask.masked_fill(mask == 0, -0.5).tril(-1) + mask.triu(0)


@pytest.mark.parametrize(("change", "reason"), [(per_head, "different positions to different heads"),
                                                (biased, "adds to logits instead of hiding positions")])
def test_masks_are_looked_at_in_every_row_and_head(change, reason, output, monkeypatch):
    model, ids = load("llama"), prompt_of("llama")

    def through_the_interface(module, query, key, value, mask, **options):
        changed = mask if mask is None else change(mask, query)
        return ALL_ATTENTION_FUNCTIONS["eager"](module, query, key, value, changed, **options)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface",
                        lambda *_: through_the_interface)
    refused(model, output, reason, lambda: model(ids))


def test_output_that_is_no_attention_of_what_is_stored_is_refused(output):
    model, ids = load("llama", "sdpa"), prompt_of("llama")
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *arguments, **options: (original(*arguments, **options)[0] * 0.9, None)
    try:
        refused(model, output, "output is 10% apart from what queries, keys and values give", lambda: model(ids))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_masks_of_flex_attention_are_looked_at():
    mask = create_block_mask(lambda batch, head, query, key: (query >= key) & (query - key < 5), 1, None, 40, 40,
                             device="cpu", BLOCK_SIZE=16)
    heads, _, part = mask_rows(mask, 40, 40)
    behind = torch.arange(40)[:, None] - torch.arange(40)
    assert heads == 1
    assert torch.equal(torch.cat([part(0, 7), part(7, 40)], 1)[0], (behind >= 0) & (behind < 5))


def test_positions_that_begin_anew_are_refused(output):
    model, ids = load("llama"), prompt_of("llama")

    def run():
        """As generate(prefill_chunk_size=20) of transformers 5.2.0."""
        cache = transformers.DynamicCache()
        for start in range(0, ids.shape[1], 20):
            piece = ids[:, start : start + 20]
            positions = torch.arange(ids.shape[1] - piece.shape[1], ids.shape[1])[None]
            model(piece, past_key_values=cache, position_ids=positions, use_cache=True)

    refused(model, output, "position 27 comes after 46: the pieces of the run are not at consecutive positions", run)


def test_positions_of_single_tokens_are_looked_at_in_the_end(output):
    model, ids = load("llama"), prompt_of("llama")

    def run():
        cache = model(ids, use_cache=True).past_key_values
        for token in range(3):
            model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[47 + 2 * token]]), use_cache=True)

    refused(model, output, "position 49 comes after 47", run)


def test_longrope_that_changes_while_decoding_is_refused(output):
    config = architectures.configuration("phi3").to_dict()
    factors = [1.0] * 8
    config.update(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors,
                                   "long_factor": [2.0] * 8, "original_max_position_embeddings": 44},
                  original_max_position_embeddings=44)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config)).eval()
    refused(model, output, r"rotary embedding changes beyond 44 tokens \(longrope\)",
            lambda: architectures.generate(model, architectures.inputs("phi3")))


def test_prompt_lookup_is_refused(output):
    model = load("llama")
    ids = prompt_of("llama").repeat(1, 2)  # something to look up
    refused(model, output, "taken out of the cache again, as by prompt lookup",
            lambda: generate(model, ids, 20, prompt_lookup_num_tokens=4))


def test_model_without_rotary_entry_of_its_full_layers_is_captured(output):
    model, run = runs("cohere_compass_text")
    with kvtrace.capture(model, output):
        run()
    assert Trace(output).model["rope_theta"] == 0
