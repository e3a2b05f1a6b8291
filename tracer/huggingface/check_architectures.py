#!/usr/bin/env python3
"""Captures a tiny random model of every decoder that transformers' causal language models have, and says of each whether its
trace is right, right without output projections, or why it is refused. Exits with 1 where a trace is silently wrong or
something failed otherwise; models that know no other attention implementation than eager "do not run" with one.

A trace is right if attention that is computed from it alone, with the mask that the format means, gives its outputs; if its
keys and values are those of the cache that generate() returns, which holds those of no other layer; if its outputs, through
gate, norm and output projection, are what a module of the model gave; the same of a prompt that runs in pieces.
Needs the environment for captures and minutes; CI runs none of it.
"""

import argparse
import collections
import contextlib
import dataclasses
import inspect
import os
import pathlib
import signal
import sys
import tempfile
import traceback
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import h5py
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import kvtrace
from plain_trace import read_layers

PROMPT, GENERATED, PIECE = 40, 6, 13
SECONDS = 300  # for one model
MOST_PARAMETERS = 3_000_000  # what is larger has a size that SIZES lacks
TOLERANCE = 1e-4

# Configurations of several models in one, whose language model stands in the mapping under its own name, and those that run
# on something else than token ids.
OTHERS = frozenset((
    "blt", "dots3_note", "fuyu", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git",
    "got_ocr2", "llama4", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5",
    "qwen3_5_moe", "qwen4_exp"))
TEXT_CONFIGS = {"emu3": "emu3_text_model", "mllama": "mllama_text_model"}
# What is looked at besides: what decides is not in every model of the type.
IMAGE = "gemma3 with an image"
VARIANTS = {IMAGE: "gemma3", "gemma4_text with layers of one shape": "gemma4_text",
            "minimax_m3_vl_text with sparse layers": "minimax_m3_vl_text", "phimoe with a window": "phimoe",
            "qwen2_moe with a window": "qwen2_moe"}

# What configurations call their sizes.
SIZES = {name: value for value, names in (
    (64, "hidden_size d_model n_embd dim emb_dim embedding_size lru_width input_embedding_size output_embedding_size "
         "attention_hidden_size word_embed_proj_dim decoder_hidden_size"),
    (96, "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dff mlp_hidden_size d_inner "
         "dim_ff intermediate_size_mlp feed_forward_size"),
    (4, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads kv_n_heads num_kv_heads"),
    (16, "head_dim d_kv dim_head kv_channels swa_head_dim swa_v_head_dim d_head attention_head_size"),
    (160, "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size unpadded_vocab_size"),
    (512, "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx seq_length max_target_positions"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k num_experts_per_token"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
         "moe_shared_expert_intermediate_size router_hidden_size pronunciation_embed_dim shape_embed_dim "
         "hidden_size_per_layer_input laurel_rank q_lora_rank"),
    (1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers zero_expert_num "
        "mamba_n_groups n_groups bos_token_id"),
    (24, "kv_lora_rank sliding_window sliding_window_size attention_window_size"),
    (8, "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads"),
    (16, "qk_head_dim v_head_dim mamba_d_head mamba_d_state mamba_head_dim ssm_state_size state_size linear_key_head_dim "
         "linear_value_head_dim linear_head_dim attention_chunk_size index_head_dim index_topk o_lora_rank"),
    (2, "linear_num_key_heads type_vocab_size eos_token_id index_n_heads o_groups"),
    (4, "linear_num_value_heads linear_num_heads d_rel"),
    (64, "rel_extent"),
    (0, "pad_token_id"),
) for name in names.split()}

# What single ones need besides.
_LATENT = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LATE_SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
MORE = {
    "axk1": _LATENT, "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {**_SLIDING, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}},
    "cpmant": {"position_bias_num_buckets": 32},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "deepseek_v32": _LATENT,
    "dory": {"layer_types": ["full_attention"] * 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": _SLIDING,
    "dots3_note_text": {**_LATENT, "per_layer_config": {}, "layer_types": ["indexed_attention"] * 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3_text": _SLIDING,
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 6,
                     "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_text": {**_SLIDING, "num_kv_shared_layers": 2, "num_global_key_value_heads": 1, "global_head_dim": 32,
                    "attention_k_eq_v": True},
    "gemma4_text with layers of one shape": {**_SLIDING, "num_kv_shared_layers": 2, "num_global_key_value_heads": 2,
                                             "global_head_dim": 16},
    "gemma4_unified_text": _SLIDING,
    "glm4_moe_lite": _LATENT, "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "kimi_linear": {**_LATENT, **_LINEAR},
    "kolibri1": _SLIDING, "laguna": _SLIDING,
    "lfm2": _CONVOLUTION, "lfm2_moe": _CONVOLUTION,
    "longcat_flash": {**_LATENT, "num_layers": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": _SLIDING,
    "minicpm3": _LATENT,
    "minimax": {**_LINEAR, "sliding_window": None},
    "minimax_m3_vl_text with sparse layers": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
                                              "index_block_size": 4, "index_topk_blocks": 2},
    "ministral": _SLIDING,
    "mllama": {"cross_attention_layers": [1],
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "modernbert-decoder": {**_SLIDING, "local_attention": 48},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "attention"]},
    "olmo_hybrid": _LINEAR,
    "phimoe": {"sliding_window": None},
    "phimoe with a window": {"sliding_window": 24},
    "qwen2": _LATE_SLIDING, "qwen2_moe with a window": _LATE_SLIDING, "qwen3": _LATE_SLIDING, "qwen3_moe": _LATE_SLIDING,
    "qwen3_5_moe_text": _LINEAR, "qwen3_5_text": _LINEAR, "qwen3_next": _LINEAR,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
                       "hc_lowrank": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"],
                 "num_buckets": 4},
    "sarvam_mla": _LATENT,
    "smollm3": {**_SLIDING, "use_sliding_window": True},
    "xlnet": {"d_head": 16, "mem_len": None},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "n_mamba_heads": 2,
              "use_mamba_kernels": False, "attention_head_dim": 32, "attention_hidden_size": 128,
              "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_d_state": 16},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
}
for _name in ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
              "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
              "xmod"):
    MORE[_name] = {**MORE.get(_name, {}), "is_decoder": True}


def _configuration(kind, more):
    names = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    return kind(**{**{name: value for name, value in SIZES.items() if name in names}, **more})


def configuration(name):
    if name in ("gemma3", IMAGE):
        # The only one here that is not a language model alone: with an image its mask is another.
        text = _configuration(CONFIG_MAPPING["gemma3_text"], _SLIDING)
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}
        return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=150,
                                        boi_token_index=151, eoi_token_index=152)
    kind = VARIANTS.get(name, name)
    return _configuration(CONFIG_MAPPING[TEXT_CONFIGS.get(kind, kind)], MORE.get(name, {}))


def build(name, attention):
    """A model whose attention is far from uniform."""
    config = configuration(name)
    kind = getattr(transformers, CLASSES[VARIANTS.get(name, name)])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the tiny model has {size:,} parameters")
    config = configuration(name)  # building it may have changed it
    config._attn_implementation = attention
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in path.lower():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inputs(name):
    ids = torch.randint(3, 140, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    if name != IMAGE:
        return {"input_ids": ids}
    ids[0, 10:16] = torch.tensor([151, 150, 150, 150, 150, 152])
    kinds = (ids == 150).long()
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids, "pixel_values": image, "token_type_ids": kinds}
    return given


def generate(model, given, **options):
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False,
                              return_dict_in_generate=True, **options)


class Passing:
    """What leaves every module with a matrix, but for its bias, pass by pass."""

    def __init__(self, model):
        self.results = collections.defaultdict(list)
        self.modules = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
        self._hooks = [module.register_forward_hook(self._note) for module in self.modules]

    def _note(self, module, _, result):
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            bias = getattr(module, "bias", None)
            rows = result if bias is None else result - bias
            self.results[module].append(rows.detach().reshape(-1, rows.shape[-1]).clone())

    def end(self):
        for hook in self._hooks:
            hook.remove()

    def apart(self, rows):
        """How far rows are from the nearest of what modules gave."""
        return min((distance(rows, torch.cat(given)) for given in self.results.values()), default=float("inf"))


def distance(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def states(cache):
    """The keys and values that a cache holds, by layer."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "key_cache"):  # those that some hybrids had before transformers 5.2
        held = dict(enumerate(zip(cache.key_cache, cache.value_cache)))
    else:
        held = {number: (getattr(layer, "keys", None), getattr(layer, "values", None))
                for number, layer in enumerate(cache.layers)}
    return {number: pair for number, pair in held.items() if pair[0] is not None and pair[0].numel() and pair[0].dim() == 4}


def faults(path, passing, cache):
    """What of a trace is not what the model did, in words; and whether every layer has its projection."""
    found = []
    layers, held = read_layers(path), states(cache)
    for number, layer in layers.items():
        apart = distance(layer.outputs, layer.attention()[0])
        if not apart <= TOLERANCE:
            found.append(f"layer {number}: outputs are {apart:.0e} from what the trace gives")
        keys, values = held[int(layer.attributes.get("cache_of", number))]
        if "values_in_keys" in layer.attributes:  # latent rows and rotary keys side by side
            keys, values = torch.cat([keys, values], -1), keys
        pairs = [("keys", layer.keys, keys), ("values", layer.values, values)]
        for name, ours, cached in pairs:
            apart = distance(ours[:, -cached.shape[2]:], cached[0])
            if not apart <= TOLERANCE:
                found.append(f"layer {number}: {name} {ours.shape} are not the cache's {tuple(cached.shape)}")
        if "output_projection" in layer.tensors:
            apart = passing.apart(layer.block_output())
            if not apart <= TOLERANCE:
                found.append(f"layer {number}: the projection gives something else ({apart:.0e} apart)")
    holding = {number: keys.untyped_storage().data_ptr() for number, (keys, _) in held.items()}
    if set(holding) != {number for number, layer in layers.items() if "cache_of" not in layer.attributes}:
        found.append(f"the cache holds keys of the layers {', '.join(map(str, holding))}")
    if len(set(holding.values())) < len(holding):
        found.append("the cache holds the same keys for several layers")
    return found, all("output_projection" in layer.tensors for layer in layers.values())


def same(path, other):
    """Whether two traces hold the same, but for rounding."""
    with h5py.File(path) as one, h5py.File(other) as two:
        names = []
        one.visititems(lambda name, thing: names.append(name) if isinstance(thing, h5py.Dataset) else None)
        return all(name in two and distance(one[name][()], two[name][()]) <= TOLERANCE for name in names
                   if one[name].dtype.kind in "fi")


def capture(model, given, path, **options):
    """Captures a run: what generate() returns, and what modules gave."""
    passing = Passing(model)
    try:
        with kvtrace.capture(model, path):
            return generate(model, given, **options), passing
    finally:
        passing.end()


def examine(name, attention_name):
    """The verdict on one model, and what it rests on."""
    try:
        model, given = build(name, attention_name), inputs(name)
        alone = generate(model, given).sequences
    except Exception as problem:
        return "does not run", f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path, pieces = os.path.join(folder, "run.h5"), os.path.join(folder, "pieces.h5")
        try:
            result, passing = capture(model, given, path)
        except kvtrace.CaptureError as problem:
            return "refused", str(problem)
        found, has_projections = faults(path, passing, result.past_key_values)
        if result.sequences.tolist() != alone.tolist():
            found.append("captured, it generates something else")
        try:
            other, passing = capture(model, given, pieces, prefill_chunk_size=PIECE)
            found += [f"the prompt in pieces: {fault}" for fault in faults(pieces, passing, other.past_key_values)[0]]
            # The states of some recurrent layers are others where the prompt comes in pieces.
            whole, parts = states(result.past_key_values), states(other.past_key_values)
            alike = all(distance(keys, parts[number][0]) <= TOLERANCE for number, (keys, _) in whole.items())
            if alike and not found and not same(path, pieces):
                found.append("the prompt in pieces gives another trace")
        except kvtrace.CaptureError as problem:
            if not found:
                return "right", f"but in pieces it is refused: {problem}"
        except Exception:
            pass  # the model's own: some cannot run a prompt in pieces
        if found:
            return "WRONG", "; ".join(found[:3])
        words = [str(warning.message) for warning in told if "projection" in str(warning.message)]
        if has_projections:
            return "right", ""
        return ("right without projection", words[0]) if words else ("WRONG", "goes without projections, and nothing tells so")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--attention", default="eager", help="attention implementation (default: eager)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def too_slow(*_):
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    types = arguments.types or [*(name for name in CLASSES if name not in OTHERS), *VARIANTS]
    print("| model type | result | why |\n|---|---|---|")
    counts, of_variants = collections.Counter(), collections.Counter()
    for name in types:
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what models print
                verdict, why = examine(name, arguments.attention)
        except Exception as problem:
            traceback.print_exc()
            verdict, why = "CRASH", f"{type(problem).__name__}: {problem}"
        signal.alarm(0)
        (of_variants if name in VARIANTS else counts)[verdict] += 1
        print(f"| {name} | {verdict} | {why.replace('|', '/')} |", flush=True)
    print(f"\nWith transformers {transformers.__version__} and attention by {arguments.attention}:")
    for what, counted in (("model types", counts), ("besides", of_variants)):
        if counted:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
            print(f"- {sum(counted.values())} {what}: {verdicts}")
    counts += of_variants
    sys.exit(1 if counts["WRONG"] or counts["CRASH"] or (counts["does not run"] and arguments.attention == "eager") else 0)


if __name__ == "__main__":
    main()
