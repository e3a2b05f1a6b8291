#!/usr/bin/env python3
"""Measures what a capture costs: time over the same run without it, peak extra memory of the GPU, and GB/s to the file.

Makes a Llama of random weights on the device (by default one of 1.2 billion parameters) and runs it on random token ids, first
without and then with a capture, each after a run that warms up. Runs on a CPU too, where GPU memory is not measured.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import kvtrace


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(device, run):
    """Seconds, and the peak of GPU memory in bytes (0 on a CPU)."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--attn-implementation", default="sdpa")
    add("--tokens", type=int, default=32768, help="of the prompt (default: 32768)")
    add("--new-tokens", type=int, default=32)
    add("--layers", type=int, default=16)
    add("--hidden", type=int, default=2048)
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--vocabulary", type=int, default=128256)
    add("--queries", default="window:64")
    add("--attention-mass", action="store_true")
    add("--repeat", type=int, default=3, help="runs of each kind, of which the median counts (default: 3)")
    add("--folder", default=None, help="where the trace is written and removed again (default: the temporary folder)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU; --device cpu measures without one")
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=arguments.tokens + arguments.new_tokens, rope_theta=500000.0, tie_word_embeddings=True)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, arguments.dtype), attn_implementation=arguments.attn_implementation).eval()
    ids = torch.randint(3, arguments.vocabulary, (1, arguments.tokens), device=device)

    def generate():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.new_tokens,
                       min_new_tokens=arguments.new_tokens, do_sample=False)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = os.path.join(folder, "run.h5")

        def capture():
            with kvtrace.capture(model, path, queries=arguments.queries, attention_mass=arguments.attention_mass):
                generate()

        results = {}
        for name, run in (("alone", generate), ("captured", capture)):
            run()
            results[name] = [measured(device, run) for _ in range(arguments.repeat)]
        size = os.path.getsize(path)
    alone, captured = (statistics.median(seconds for seconds, _ in results[name]) for name in ("alone", "captured"))
    memory = [max(peak for _, peak in results[name]) for name in ("alone", "captured")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {arguments.attn_implementation}, "
          f"{arguments.dtype}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, {arguments.tokens} + "
          f"{arguments.new_tokens} tokens, queries {arguments.queries}")
    print(f"alone {alone:.2f} s, captured {captured:.2f} s: {captured / alone:.2f} times")
    print(f"trace {size / 1e9:.3g} GB: {size / 1e9 / captured:.3g} GB/s of the captured run")
    if device.type == "cuda":
        print(f"GPU memory: {memory[0] / 1e9:.2f} GB alone, {memory[1] / 1e9:.2f} GB captured: "
              f"{(memory[1] - memory[0]) / 1e6:.0f} MB more")


if __name__ == "__main__":
    main()
