#!/usr/bin/env python3
"""Prints the table of docs/capture.md: bytes of a trace by model and length, in bfloat16. Needs Python alone.

--check FILE compares the table that stands in FILE between its two marks.
"""

import argparse
import pathlib
import sys

# Layers, query heads, KV heads, head dimension, hidden size, as the models' config.json has them.
MODELS = {
    "Llama 3.2 1B": (16, 32, 8, 64, 2048),
    "Llama 3.1 8B": (32, 32, 8, 128, 4096),
    "Llama 3.3 70B": (80, 64, 8, 128, 8192),
    "Llama 2 7B": (32, 32, 32, 128, 4096),
    "Mistral 7B v0.3": (32, 32, 8, 128, 4096),
    "Qwen 2.5 7B": (28, 28, 4, 128, 3584),
    "Qwen 3 8B": (36, 32, 8, 128, 4096),
    "Gemma 2 9B": (42, 16, 8, 256, 3584),
    "Phi-3 mini": (32, 32, 32, 96, 3072),
}
LENGTHS = (4096, 32768, 131072)
GENERATED = 64
WINDOW = 64
BEGIN, END = "<!-- tracer/huggingface/disk_space.py -->", "<!-- end -->"


def trace_bytes(shape, prompt, queries=WINDOW, mass=True, element=2):
    """What the tensors of a trace take: keys and values of every token, queries and outputs of the captured ones, the
    projection, and the attention mass in float32."""
    layers, heads, kv_heads, dim, hidden = shape
    tokens = prompt + GENERATED - 1  # the last one generated is not fed back
    captured = min(prompt, queries) + GENERATED - 1
    layer = 2 * kv_heads * tokens * dim * element + 2 * heads * captured * dim * element
    layer += hidden * heads * dim * element
    return layers * (layer + (4 * heads * prompt if mass else 0))


def size(count):
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def table():
    lines = ["| model | projections | " + " | ".join(f"{length:,}" for length in LENGTHS) +
             f" | all queries, {LENGTHS[1]:,} |", "|---|---:|" + "---:|" * (len(LENGTHS) + 1)]
    for name, shape in MODELS.items():
        layers, heads, _, dim, hidden = shape
        cells = [size(layers * hidden * heads * dim * 2), *(size(trace_bytes(shape, length)) for length in LENGTHS),
                 size(trace_bytes(shape, LENGTHS[1], queries=LENGTHS[1]))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE", help="the document to compare with")
    document = parser.parse_args().check
    if document is None:
        print(table())
        return
    text = document.read_text()
    if BEGIN not in text or text.split(BEGIN)[1].split(END)[0].strip() != table():
        sys.exit(f"{document}: its table is not what {pathlib.Path(__file__).name} prints; put that there")
    print(f"{document}: its table is what this script prints")


if __name__ == "__main__":
    main()
