#!/usr/bin/env python3
"""Makes the tiny models that the tests of model families compare with, and what transformers computes with them.

Each family gets a folder with
  config.json        as checkpoints of the family carry it
  model.safetensors  random weights, a few tens of kilobytes
  prompt.ids         token ids of a prompt
  expected.h5        /prompt_ids [P], /generated_ids [G] (greedy), /logits [G, V]: for each generated token the logits
                     that it is the largest of, so the first row is that of the prompt's last position
  trace.h5           the capture of that run by the package kvtrace: float32, window:24, with attention_mass
Models, prompts and ids are the same bytes on every machine; logits and traces differ in the last bits from processor to
processor. --check makes everything anew and compares it with what is there.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SOURCE_DATE_EPOCH"] = "1767225600"  # the fixtures' created_at: they are not dated

import h5py
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import kvtrace

# What the weights' values are like, by the end of their names; the first that fits counts. "around one" is what a norm's
# weights are near after training; families that add 1 to them have them near zero.
SPREADS = (
    ("embed_tokens.weight", "embedding"),
    ("lm_head.weight", "matrix"),
    ("norm.weight", "norm"),
    ("layernorm.weight", "norm"),
    (".bias", "bias"),
    (".weight", "matrix"),
)

BASE = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.57.1"}

# Configurations in the words of the checkpoints that people download, but for the sizes: those are odd, and no two that
# could be mistaken for each other are equal. What a family's models have and another family's have not is switched on.
FAMILIES = {
    # Eight query heads on one KV head; nothing tied.
    "llama": {
        "seed": 11, "prompt": 47, "generate": 8, "dtype": "float32",
        "config": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 167, "hidden_size": 48,
            "intermediate_size": 59, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 1,
            "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
            "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "float32",
        },
    },
    # Llama 3.2: scaled rotary frequencies over a context that the prompt exceeds, tied embeddings, a head dimension that
    # is written down.
    "llama3": {
        "seed": 22, "prompt": 61, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 211, "hidden_size": 48,
            "intermediate_size": 77, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 2,
            "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 32, "rope_type": "llama3"},
            "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        },
    },
    # A sliding window shorter than the prompt, in every layer.
    "mistral": {
        "seed": 23, "prompt": 71, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 193, "hidden_size": 36,
            "intermediate_size": 83, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 10, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0, "sliding_window": 19, "attention_dropout": 0.0, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    },
    # Biases on q, k and v but not on o; tied; a sliding window that is named but, as in every released model, not used.
    "qwen2": {
        "seed": 14, "prompt": 53, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 227, "hidden_size": 42,
            "intermediate_size": 79, "num_hidden_layers": 2, "num_attention_heads": 7, "num_key_value_heads": 1,
            "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 11, "use_sliding_window": False, "max_window_layers": 1, "attention_dropout": 0.0,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        },
    },
    # Norms of every head's query and key; heads wider than hidden size / heads; a window in the layers from
    # max_window_layers on.
    "qwen3": {
        "seed": 25, "prompt": 53, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 223, "hidden_size": 44,
            "intermediate_size": 73, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 18, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
            "sliding_window": 17, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    },
    # Gemma 1: GeGLU, embeddings times the root of the hidden size, 1 + w norms, one KV head.
    "gemma": {
        "seed": 26, "prompt": 47, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 229, "hidden_size": 40,
            "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1,
            "head_dim": 14, "hidden_act": "gelu", "hidden_activation": None, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
            "attention_dropout": 0.0, "pad_token_id": 0, "torch_dtype": "bfloat16",
        },
    },
    # Gemma 2: both soft caps low enough to bend, local and global layers in turn, a query scale of its own, norms before
    # and after attention and MLP.
    "gemma2": {
        "seed": 47, "prompt": 59, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 197, "hidden_size": 36,
            "intermediate_size": 69, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 12, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 128, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 16,
            "cache_implementation": "hybrid", "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0, "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        },
    },
    # Gemma 3: one global layer after every two local ones, each kind with its rotary base, the global one's positions
    # scaled; norms of every head's query and key.
    "gemma3": {
        "seed": 18, "prompt": 59, "generate": 8, "dtype": "bfloat16",
        "config": {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 191, "hidden_size": 36,
            "intermediate_size": 67, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 21, "sliding_window_pattern": 3,
            "cache_implementation": "hybrid", "query_pre_attn_scalar": 20, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        },
    },
    # The same family in the words of transformers 5: layer types one by one, rotary parameters by kind of layer.
    "gemma3-layer-types": {
        "seed": 29, "prompt": 43, "generate": 5, "dtype": "bfloat16",
        "config": {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 173, "hidden_size": 34,
            "intermediate_size": 65, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 256,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "full_attention": {"factor": 4.0, "rope_theta": 500000.0, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 20000.0, "rope_type": "default"},
            },
            "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 15,
            "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0, "dtype": "bfloat16",
            "tie_word_embeddings": True, "use_bidirectional_attention": False,
        },
    },
    # Tied by its configuration, as the model was that a fine-tune began with, but with a head of its own in the file.
    "llama-own-head": {
        "seed": 31, "prompt": 29, "generate": 5, "dtype": "bfloat16", "own_head": True,
        "config": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 149, "hidden_size": 32,
            "intermediate_size": 51, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        },
    },
    # Gemma 1 looks at hidden_act alone.
    "gemma-other-activation": {
        "seed": 32, "prompt": 29, "generate": 5, "dtype": "bfloat16",
        "config": {
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 151, "hidden_size": 32,
            "intermediate_size": 53, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 10, "hidden_act": "gelu", "hidden_activation": "silu", "max_position_embeddings": 128,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
            "attention_dropout": 0.0, "pad_token_id": 0, "torch_dtype": "bfloat16",
        },
    },
    # Gemma 2 looks at hidden_activation alone, "gelu" is GELU itself there, and every other layer has a window whatever
    # a pattern says.
    "gemma2-pattern": {
        "seed": 33, "prompt": 37, "generate": 5, "dtype": "bfloat16",
        "config": {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 157, "hidden_size": 32,
            "intermediate_size": 57, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 10, "hidden_act": "silu", "hidden_activation": "gelu", "max_position_embeddings": 128,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 14, "_sliding_window_pattern": 3,
            "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0,
            "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0, "torch_dtype": "bfloat16",
        },
    },
    # Gemma 3 takes neither the old name of rope_type nor that of a pattern with an underscore: no position is scaled, and
    # the sixth of seven layers has no window.
    "gemma3-old-names": {
        "seed": 35, "prompt": 37, "generate": 5, "dtype": "bfloat16",
        "config": {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 163, "hidden_size": 32,
            "intermediate_size": 55, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "type": "linear"}, "sliding_window": 13, "_sliding_window_pattern": 2,
            "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0, "torch_dtype": "bfloat16",
        },
    },
    # Phi-3: q, k and v in one matrix, gate and up in another; a window; float16 weights.
    "phi3": {
        "seed": 20, "prompt": 47, "generate": 8, "dtype": "float16",
        "config": {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 181, "hidden_size": 40,
            "intermediate_size": 63, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "hidden_act": "silu", "max_position_embeddings": 128, "original_max_position_embeddings": 128,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 23,
            "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16",
        },
    },
}


def weight(name, shape, random, adds_one):
    """Values at which no term of the forward pass is trivial and the logits are not all alike."""
    spread = next(spread for end, spread in SPREADS if name.endswith(end))
    values = random.standard_normal(shape)
    if spread == "norm":
        # Away from 1 as much as from 0, in either convention.
        return (0.0 if adds_one else 1.0) + 0.35 * values
    if spread == "bias":
        return 0.6 * values
    if spread == "embedding":
        return 0.8 * values / (shape[1] ** 0.5 if adds_one else 1.0)
    return 1.6 * values / shape[1] ** 0.5


def make_model(folder, family):
    """config.json and model.safetensors, with the tensors that transformers' own model of that configuration has."""
    config = {**BASE, **family["config"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    # Of NumPy's generators the one whose numbers are promised never to change.
    random = np.random.RandomState(family["seed"])
    adds_one = config["model_type"].startswith("gemma")
    tensors = {}
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings", adds_one) else set()
    if family.get("own_head"):
        tied.clear()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name in tied:
            continue
        values = weight(name, tuple(parameter.shape), random, adds_one)
        tensors[name] = torch.from_numpy(values).to(getattr(torch, family["dtype"])).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    prompt = random.randint(3, config["vocab_size"], family["prompt"])
    prompt[0] = config["bos_token_id"]
    (folder / "prompt.ids").write_text(" ".join(map(str, prompt)) + "\n")
    return prompt


def load(folder):
    """The model as transformers reads it from the folder; an error if it left a tensor out or made one up."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"{folder}: {wrong}")
    return model.eval()


def run(model, prompt, generate, trace):
    """Greedy decoding, captured: the generated ids [G] and the logits [G, V] that they are the largest of."""
    with kvtrace.capture(model, trace, queries="window:24", attention_mass=True, source="prompt prompt.ids"):
        result = model.generate(
            torch.tensor([prompt.tolist()]), max_new_tokens=generate, do_sample=False, output_logits=True,
            return_dict_in_generate=True)
    generated = result.sequences[0, len(prompt):].numpy()
    logits = torch.cat(result.logits).float().numpy()
    if len(generated) != generate:
        sys.exit("the sequence ends early; take another seed")
    best = np.sort(logits, axis=1)
    # A test that compares ids must not hang on the last bits.
    margin = ((best[:, -1] - best[:, -2]) / logits.std(axis=1)).min()
    if margin < 0.01:
        sys.exit(f"two logits are as good as equal (margin {margin:.2g}); take another seed")
    if len(set(generated.tolist())) < 3:
        sys.exit(f"the model repeats itself ({generated.tolist()}); take another seed")
    return generated, logits


def make(root, name, family):
    folder = root / name
    folder.mkdir(parents=True)
    prompt = make_model(folder, family)
    model = load(folder)
    generated, logits = run(model, prompt, family["generate"], folder / "trace.h5")
    with h5py.File(folder / "expected.h5", "w", libver=("v110", "v110")) as file:
        file["prompt_ids"] = prompt.astype("<i4")
        file["generated_ids"] = generated.astype("<i4")
        file["logits"] = logits.astype("<f4")
    return logits


def contents(path):
    """The datasets and the attributes of an HDF5 file, but for what names versions and the processor."""
    found = {}

    def add(name, thing):
        if isinstance(thing, h5py.Dataset):
            found[name] = thing[()]
        found.update({f"{name}@{key}": value for key, value in thing.attrs.items()})

    with h5py.File(path) as file:
        add("", file)
        file.visititems(add)
    varies = ("@created_by", "@source", "provenance@")
    return {name: value for name, value in found.items() if not name.startswith(varies)}


def differences(made, committed):
    """What differs between two folders of a family, a line each: bytes, or in results more than the last bits."""
    for name in ("config.json", "model.safetensors", "prompt.ids"):
        if (made / name).read_bytes() != (committed / name).read_bytes():
            yield f"{committed / name}: differs"
    for name in ("expected.h5", "trace.h5"):
        ours, theirs = contents(made / name), contents(committed / name)
        if ours.keys() != theirs.keys():
            yield f"{committed / name}: {sorted(ours.keys() ^ theirs.keys())} in one only"
            continue
        for key, value in ours.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                other = theirs[key]
                same = value.shape == other.shape and np.linalg.norm(value - other) <= 1e-5 * np.linalg.norm(other)
            else:
                same = np.array_equal(value, theirs[key])
            if not same:
                yield f"{committed / name}: {key} differs"


def check(root, names):
    """Makes the families anew and says what differs from `root`. Returns whether nothing does."""
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder)
        for name in names:
            make(made, name, FAMILIES[name])
            faults += differences(made / name, root / name)
    print("\n".join(faults) if faults else f"{len(names)} families are what this script makes")
    return not faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the families stand: tests/tracer/families")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs from what is there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = arguments.family or list(FAMILIES)
    if arguments.check:
        sys.exit(0 if check(arguments.folder, names) else 1)
    for name in names:
        shutil.rmtree(arguments.folder / name, ignore_errors=True)
        logits = make(arguments.folder, name, FAMILIES[name])
        size = sum(file.stat().st_size for file in (arguments.folder / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KiB, logits {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    main()
