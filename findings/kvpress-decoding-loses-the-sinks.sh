#!/usr/bin/env bash
# DecodingPress of kvpress 0.5.5 (transformers 5.2.0, PyTorch 2.15.0, CPU) leaves the cache's rows in the order of their
# scores. StreamingLLMPress, compressing that cache again, takes its first four rows for the first four tokens: with every
# compression other tokens stand there, and the attention sinks that it is meant to keep go. One would expect tokens 0 to 3
# to stay for ever. Seen, with a random model of one layer, 32 tokens of prompt, and 40 decoded with a target of 16 rows and
# a compression every 8:
#   after token 39: sinks left [0, 1, 2, 3], first rows [1, 39, 38, 37]
#   after token 47: sinks left [0, 1, 2, 3], first rows [28, 47, 46, 45]
#   after token 55: sinks left [1], first rows [37, 55, 54, 53]
#   after token 63: sinks left [], first rows [45, 63, 62, 61]
#   after token 71: sinks left [], first rows [53, 71, 70, 69]
# Exits with 1 once a sink is left at the end.
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
from kvpress import DecodingPress, StreamingLLMPress
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
prompt, decoded = 32, 40
ids = torch.randint(0, 64, (1, prompt + decoded))
whole, cache = DynamicCache(), DynamicCache()
press = DecodingPress(base_press=StreamingLLMPress(n_sink=4), compression_interval=8, target_size=16)
with torch.no_grad():
    model(ids, past_key_values=whole)
    with press(model):
        model(ids[:, :prompt], past_key_values=cache)
        for token in range(prompt, prompt + decoded):
            before = cache.get_seq_length()
            at = torch.tensor([token])
            model(ids[:, token : token + 1], past_key_values=cache, position_ids=at[None], cache_position=at)
            if cache.get_seq_length() > before:
                continue
            distances = torch.cdist(cache.layers[0].keys[0, 0], whole.layers[0].keys[0, 0])
            rows = distances.argmin(dim=1).tolist()
            sinks = sorted(row for row in rows if row < 4)
            print(f"after token {token}: sinks left {sinks}, first rows {rows[:4]}")
sys.exit(1 if sinks else 0)
PYTHON
