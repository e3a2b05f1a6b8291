#!/usr/bin/env bash
# Makes and checks the reports that could become too large: of a prompt of 131,072 tokens, and of a sweep of 400 settings.
#   scripts/check-large-reports.sh KVREPLAY PYTHON
# PYTHON is that of what `scripts/make-report-environment.sh --checks` makes. Pictures may have 2 MB; how long a page takes to
# be there is printed, and is wrong only where it is far from the 3 seconds that it should stay below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvreplay=$1
export KVREPLAY_REPORT_PYTHON=$2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

quietly() {
  "$@" >"$folder/log" 2>&1 || {
    cat "$folder/log" >&2
    exit 1
  }
}

echo 'check-large-reports: 131,072 tokens'
quietly "$kvreplay" synth --prompt-tokens 131072 --tokens 131104 --layers 4 --heads 8 --kv-heads 2 --head-dim 32 \
  --dtype float16 -o "$folder/long.h5"
quietly "$kvreplay" replay "$folder/long.h5" --policy random recent streamingllm snapkv restkv restkv+adakv knorm \
  --capacity 1024,4096,16384,25% --rank-agreement -o "$folder/long-results.h5" --kept "$folder/long-kept.h5"
quietly "$kvreplay" report "$folder/long-results.h5" --kept "$folder/long-kept.h5" --trace "$folder/long.h5" \
  -o "$folder/long"
"$KVREPLAY_REPORT_PYTHON" scripts/check-report.py "$folder/long" --open-within 12

echo 'check-large-reports: 400 settings'
quietly "$kvreplay" capture --model traces/demo-model --prompt traces/prompts/facts.txt \
  --spans traces/prompts/facts.spans.json --generate 32 -o "$folder/facts.h5"
quietly "$kvreplay" sweep "$folder/facts.h5" --policy 'restkv(alpha={0.05:0.95:0.1},beta={10,20,40,80,160,320,640,1280,2560,5120})' \
  --capacity 64,128,256,512 -o "$folder/sweep.h5"
quietly "$kvreplay" report "$folder/sweep.h5" -o "$folder/sweep"
"$KVREPLAY_REPORT_PYTHON" scripts/check-report.py "$folder/sweep" --open-within 12
