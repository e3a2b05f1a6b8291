#!/usr/bin/env bash
# SnapKVPress of kvpress 0.5.5 (transformers 5.2.0, PyTorch 2.15.0, CPU) gives all positions of its observation window, the
# newest 64, one and the same score. Where fewer than 64 positions are to stay, top-k chooses among equals: of 100 tokens at
# a ratio of 0.75, 25 stay, and none of the newest 24 is among them, the last token of the prompt included. One would expect
# the newest to stay, or the budget to be refused. Seen, with a random model of one layer:
#   compression_ratio 0.75 of 100 tokens: 25 stay, positions 51 to 75
# Exits with 1 once one of the newest 24 stays.
# Installs 5.5 GB into a temporary folder, or takes the Python that PYTHON names, which has these versions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/environment"
  python=$folder/environment/bin/python
  "$python" -m pip install --quiet --disable-pip-version-check kvpress==0.5.5 transformers==5.2.0 torch==2.15.0 >&2
fi
"$python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from kvpress import SnapKVPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

for package, described in (("kvpress", "0.5.5"), ("transformers", "5.2.0"), ("torch", "2.15.0")):
    print(package, version(package))
    if version(package) != described:
        sys.exit(f"{package} {described} is what this describes")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
).eval()
ids = torch.randint(0, 64, (1, 100))
whole, cache = DynamicCache(), DynamicCache()
with torch.no_grad():
    model(ids, past_key_values=whole)
    with SnapKVPress(compression_ratio=0.75)(model):
        model(ids, past_key_values=cache)
distances = torch.cdist(cache.layers[0].keys[0, 0], whole.layers[0].keys[0, 0])
rows = sorted(distances.argmin(dim=1).tolist())
between = "" if rows == list(range(rows[0], rows[-1] + 1)) else ", not all"
print(f"compression_ratio 0.75 of 100 tokens: {len(rows)} stay, positions {rows[0]} to {rows[-1]}{between}")
sys.exit(0 if len(rows) == 25 and rows[-1] < 76 else 1)
PYTHON
