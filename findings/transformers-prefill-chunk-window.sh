#!/usr/bin/env bash
# transformers 5.1.0: after generate(prefill_chunk_size=N) every generated token of a layer with a sliding window sees one
# position less than the window holds.
#
# A guess: a prompt that runs in pieces leaves a cache from which generation goes on as from one that ran whole.
# What 5.1.0 does: behind a prompt of 37 tokens in pieces, a layer with a window of 14 has 14 keys for the token that runs
# next, and its mask hides the oldest; without pieces it sees all 14. The positions of the pieces are right (those of 5.2.0 are
# not, see transformers-prefill-chunk-positions.sh, and it hides that key as well). Nothing tells. In 5.3.0 it sees 14.
#
# Seen, of a tiny Mistral with random weights on a CPU (torch 2.15.0), by prefill_chunk_size:
#   transformers 5.1.0: whole 14 of 14 keys, 7: 13 of 14, 20: 13 of 14; other tokens
#   transformers 5.3.0: whole 14 of 14 keys, 7: 14 of 14, 20: 14 of 14; same tokens
#
# Needs the network, 6 GB of disk and minutes. Exits with 1 where a version does anything else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/environment"
python=$folder/environment/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6

cat >"$folder/window.py" <<'END'
import sys

import torch
import transformers
import transformers.models.mistral.modeling_mistral as mistral

version, *expected = sys.argv[1:]
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = mistral.MistralForCausalLM(transformers.MistralConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, sliding_window=14, attn_implementation="eager")).eval()
prompt = torch.randint(3, 128, (1, 37))
seen = []
attention = mistral.eager_attention_forward


def look(module, query, key, value, mask, **options):
    if query.shape[2] == 1:  # a token that was generated
        seen.append(f"{int((mask[0, 0, 0] == 0).sum())} of {key.shape[2]}")
    return attention(module, query, key, value, mask, **options)


mistral.eager_attention_forward = look
found, tokens = [], []
for pieces in (None, 7, 20):
    seen.clear()
    options = {"prefill_chunk_size": pieces} if pieces else {}
    run = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **options)
    found.append(" and ".join(sorted(set(seen))))
    tokens.append(run.tolist())
same = "same" if tokens[0] == tokens[1] == tokens[2] else "other"
print(f"transformers {transformers.__version__}: whole {found[0]} keys, 7: {found[1]}, 20: {found[2]}; {same} tokens")
sys.exit([transformers.__version__, *found, same] != [version, *expected])
END

# expect VERSION KEYS_SEEN... TOKENS
expect() {
  "$python" -m pip install --quiet --disable-pip-version-check "transformers==$1"
  "$python" "$folder/window.py" "$@"
}
expect 5.1.0 "14 of 14" "13 of 14" "13 of 14" other
expect 5.3.0 "14 of 14" "14 of 14" "14 of 14" same
