#!/usr/bin/env bash
# transformers 5.2.0: generate(prefill_chunk_size=N) on a prompt of more than N tokens computes another model.
#
# A guess: a prompt that runs in pieces gives the keys, and so the tokens, of one that runs whole, but for rounding.
# What 5.2.0 does: every piece gets as many positions as it has tokens, but the last ones of the prompt: pieces of 256 of 600
# tokens run at 344 to 599, 344 to 599 and 512 to 599, while the mask and the cache say 0 to 599. Nothing tells. In 5.3.0 they
# run at 0 to 255, 256 to 511 and 512 to 599, and the keys are those of the whole prompt to the last bits.
#
# Seen, of the keys of the first layer of a tiny Llama with random weights on a CPU (torch 2.15.0):
#   transformers 5.2.0: pieces at 344-599,344-599,512-599, keys 124% apart, other tokens
#   transformers 5.3.0: pieces at 0-255,256-511,512-599, keys 0% apart, same tokens
#
# Needs the network, 6 GB of disk and minutes. Exits with 1 where a version does anything else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/environment"
python=$folder/environment/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6

cat >"$folder/pieces.py" <<'END'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

version, places, apart, tokens = sys.argv[1:]
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=1024)).eval()
prompt = torch.randint(3, 128, (1, 600))
positions = []
model.model.rotary_emb.register_forward_pre_hook(
    lambda _, arguments, named: positions.append(named.get("position_ids", arguments[-1])), with_kwargs=True)


def generate(**options):
    return model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                          pad_token_id=0, **options)


whole = generate()
positions.clear()
pieces = generate(prefill_chunk_size=256)
found = ",".join(f"{int(piece[0, 0])}-{int(piece[0, -1])}" for piece in positions if piece.shape[1] > 1)
one, other = (run.past_key_values.layers[0].keys[:, :, :600] for run in (whole, pieces))
distance = f"{float((one - other).norm() / one.norm()):.0%}"
same = "same" if torch.equal(whole.sequences, pieces.sequences) else "other"
print(f"transformers {transformers.__version__}: pieces at {found}, keys {distance} apart, {same} tokens")
sys.exit((transformers.__version__, found, distance == "0%", same) != (version, places, apart == "0%", tokens))
END

# expect VERSION POSITIONS HOW_FAR TOKENS
expect() {
  "$python" -m pip install --quiet --disable-pip-version-check "transformers==$1"
  "$python" "$folder/pieces.py" "$@"
}
expect 5.2.0 344-599,344-599,512-599 far other
expect 5.3.0 0-255,256-511,512-599 0% same
