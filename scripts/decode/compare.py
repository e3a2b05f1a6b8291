#!/usr/bin/env python3
"""Times decode-time eviction by H2O's and R-KV's own classes beside kvreplay: the same trace, steps and kept sets.

A synthetic layer of Llama-3-8B's shape is written and read by both. The authors' files are read from checkouts and run as
they are, by PyTorch in float32: after the prompt, every step's token joins the cache, its query attends to the cache, and
their class updates it when it is due. kvreplay replays the trace without measures and with all of them, reading included;
PyTorch's time is that of the steps alone. Processes take turns, and their kept sets are compared.

    git clone https://github.com/FMInference/H2O
    git clone https://github.com/Zefan-Cai/R-KV
    python3 -m venv .venv && .venv/bin/pip install torch numpy h5py
    .venv/bin/python scripts/decode/compare.py build/release-native/kvreplay --h2o H2O --rkv R-KV
"""

import argparse
import importlib.util
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

import h5py
import numpy
import torch

RKV_INTERVAL = 128  # tokens, as run_math.py sets it
RKV_WINDOW = 8
H2O_RECENT_SHARE = 2  # half of the budget


def module_of(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stand_in(name, **attributes):
    """For modules that the authors' files import and what runs here never calls."""
    module = types.ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module


def h2o_class(checkout):
    names = ["LlamaAttention", "rotate_half", "apply_rotary_pos_emb", "LlamaRotaryEmbedding", "LlamaForCausalLM"]
    for name in ["transformers", "transformers.models", "transformers.models.llama"]:
        stand_in(name)
    stand_in("transformers.models.llama.configuration_llama", LlamaConfig=object)
    stand_in("transformers.models.llama.modeling_llama", **{name: type(name, (torch.nn.Module,), {}) for name in names})
    stand_in("transformers.configuration_utils", PretrainedConfig=object)
    return module_of("h2o", checkout / "h2o_hf" / "utils_real_drop" / "modify_llama.py").H2OKVCache_LayerWise


def rkv_class(checkout):
    scores = module_of("rkv_utils", checkout / "rkv" / "utils.py")
    stand_in("rkv_compression", cal_similarity=scores.cal_similarity,
             compute_attention_scores=scores.compute_attention_scores)
    sys.modules["rkv_compression"].__path__ = []
    return module_of("rkv_compression.r1_kv", checkout / "rkv" / "compression" / "r1_kv.py").R1KV


class Layer:
    """A layer of a trace: queries [1, H, T, D], keys and values [1, K, T, D]; values begin with their positions, which no
    score looks at, so that the cache tells what it holds."""

    def __init__(self, file):
        with h5py.File(file) as trace:
            self.prompt = int(trace["tokens"].attrs["prompt_length"])
            read = lambda name: torch.from_numpy(numpy.asarray(trace[f"layers/0/{name}"], dtype=numpy.float32))[None]
            self.queries, self.keys, self.values = read("queries"), read("keys"), read("values")
        self.tokens = self.keys.shape[2]
        self.values[..., 0] = torch.arange(self.tokens)


def attention(queries, keys):
    return torch.softmax(queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1]), dim=-1)


def run_h2o(layer, cache_class, budget):
    recent = budget // H2O_RECENT_SHARE
    update = cache_class(hh_size=budget - recent, recent_size=recent)
    group = layer.queries.shape[1] // layer.keys.shape[1]
    keys, values = (rows.repeat_interleave(group, dim=1) for rows in (layer.keys, layer.values))
    prompt = layer.prompt
    weights = layer.queries[:, :, :prompt] @ keys[:, :, :prompt].transpose(2, 3) / math.sqrt(keys.shape[-1])
    weights = torch.softmax(weights + torch.full((prompt, prompt), -torch.inf).triu(1), dim=-1)
    cache = update((keys[:, :, :prompt], values[:, :, :prompt]), weights)
    del weights
    began = time.perf_counter()
    for step in range(prompt, layer.tokens):
        live = tuple(torch.cat([old, new[:, :, step:step + 1]], dim=2) for old, new in zip(cache, (keys, values)))
        paid = attention(layer.queries[:, :, step:step + 1], live[0])
        paid @ live[1]
        cache = update(live, paid)
    return time.perf_counter() - began, cache[1][0, :, :, 0]


def run_rkv(layer, cache_class, budget):
    update = cache_class(budget=budget, window_size=RKV_WINDOW)
    group = layer.queries.shape[1] // layer.keys.shape[1]
    prompt = layer.prompt
    cache = update.update_kv(layer.keys[:, :, :prompt], layer.queries[:, :, prompt - RKV_WINDOW:prompt],
                             layer.values[:, :, :prompt])
    began = time.perf_counter()
    for step in range(prompt, layer.tokens):
        cache = tuple(torch.cat([old, new[:, :, step:step + 1]], dim=2)
                      for old, new in zip(cache, (layer.keys, layer.values)))
        live = cache
        if step % RKV_INTERVAL == 0:
            cache = update.update_kv(cache[0], layer.queries[:, :, step + 1 - RKV_WINDOW:step + 1], cache[1])
        expanded = tuple(rows.repeat_interleave(group, dim=1) for rows in live)
        attention(layer.queries[:, :, step:step + 1], expanded[0]) @ expanded[1]
    return time.perf_counter() - began, cache[1][0, :, :, 0]


def replay(kvreplay, trace, spec, heads, budget, threads, folder, measures):
    command = [kvreplay, "replay", trace, "--policy", spec, "--heads", heads, "--capacity", str(budget), "--threads",
               str(threads), "--kept", str(folder / "kept.h5")]
    command += ["-o", str(folder / "results.h5")] if measures else ["--no-measures"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def kept_at_end(file, layer):
    with h5py.File(file) as kept:
        offsets, positions = kept["kept/0/offsets"][()], kept["kept/0/kept"][()]
        until = kept["kept/0/until"][()]
    sets = []
    for begin, end in zip(offsets, offsets[1:]):
        listed, last = positions[begin:end], until[begin:end]
        since = set(range(layer.prompt, layer.tokens)) - set(listed.tolist())
        sets.append(since | set(listed[last >= layer.tokens].tolist()))
    return sets


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kvreplay")
    parser.add_argument("--h2o", type=pathlib.Path, required=True, metavar="DIR", help="a clone of FMInference/H2O")
    parser.add_argument("--rkv", type=pathlib.Path, required=True, metavar="DIR", help="a clone of Zefan-Cai/R-KV")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default: 2048)")
    parser.add_argument("--steps", type=int, default=1024, help="tokens after it (default: 1024)")
    parser.add_argument("--budget", type=int, default=1024, help="positions that a head keeps (default: 1024)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="turns, of which the median is shown (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = {"h2o": (f"h2o@h2o(recent={options.budget // H2O_RECENT_SHARE})", "query", run_h2o, h2o_class(options.h2o)),
               "r-kv": ("rkv", "kv", run_rkv, rkv_class(options.rkv))}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = pathlib.Path(temporary)
        trace = folder / "layer.h5"
        subprocess.run([options.kvreplay, "synth", "--layers", "1", "--tokens", str(options.prompt + options.steps),
                        "--generate", str(options.steps), "--queries", "all", "-o", trace], check=True,
                       stdout=subprocess.DEVNULL)
        layer = Layer(trace)
        for name, (spec, heads, run, cache_class) in methods.items():
            times = {"theirs": [], "kept sets": [], "with measures": []}
            for _ in range(options.runs):
                seconds, cached = run(layer, cache_class, options.budget)
                times["theirs"].append(seconds)
                for measures in (False, True):
                    times["with measures" if measures else "kept sets"].append(
                        replay(options.kvreplay, trace, spec, heads, options.budget, options.threads, folder, measures))
            theirs = [set(row.int().tolist()) for row in cached]
            ours = kept_at_end(folder / "kept.h5", layer)
            common = [len(a & b) / max(len(a), 1) for a, b in zip(theirs, ours)]
            median = {key: statistics.median(values) for key, values in times.items()}
            print(f"{name}: theirs {median['theirs']:.2f} s, {spec} {median['kept sets']:.2f} s "
                  f"({median['theirs'] / median['kept sets']:.1f} times), with all measures "
                  f"{median['with measures']:.2f} s ({median['theirs'] / median['with measures']:.1f} times); the sets "
                  f"at the end have {100 * min(common):.1f} % in common at least, over {len(common)} heads")


if __name__ == "__main__":
    main()
