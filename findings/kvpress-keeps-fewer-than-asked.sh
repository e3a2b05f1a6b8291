#!/usr/bin/env bash
# kvpress 0.5.5 (transformers 5.2.0, PyTorch 2.15.0, CPU) keeps int(length * (1 - compression_ratio)) positions in floating
# point, at least 1. 1 - 0.9 is a little less than 0.1: of 1,000 tokens at a ratio of 0.9 one fewer than 100 stays, of 100
# one fewer than 10. Whoever compares at equal budgets has to count what was kept. Seen, with a random model of one layer:
#   compression_ratio 0.9 of 1000 tokens: 99 stay
#   compression_ratio 0.9 of 100 tokens: 9 stay
#   compression_ratio 0.8 of 20 tokens: 3 stay
#   compression_ratio 0.5 of 7 tokens: 3 stay
#   compression_ratio 0.5 of 1 tokens: 1 stay
# Exits with 1 once that is different.
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
from kvpress import KnormPress
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
same = True
for ratio, length, seen in ((0.9, 1000, 99), (0.9, 100, 9), (0.8, 20, 3), (0.5, 7, 3), (0.5, 1, 1)):
    cache = DynamicCache()
    with torch.no_grad(), KnormPress(compression_ratio=ratio)(model):
        model(torch.randint(0, 64, (1, length)), past_key_values=cache)
    kept = cache.get_seq_length()
    print(f"compression_ratio {ratio} of {length} tokens: {kept} stay")
    same = same and kept == seen
sys.exit(0 if same else 1)
PYTHON
