#!/usr/bin/env bash
# The whole way once: captures the demo model on the bundled prompts, then replays policies over what was captured.
#   scripts/demo.sh KVREPLAY
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvreplay=$1
out=out/demo
mkdir -p "$out"

run() {
  printf '\n$ %s\n' "$*" >&2
  "$@"
}

traces=()
for prompt in traces/prompts/*.txt; do
  name=$(basename "$prompt" .txt)
  run "$kvreplay" capture --model traces/demo-model --prompt "$prompt" --spans "${prompt%.txt}.spans.json" --generate 32 \
    -o "$out/$name.h5"
  traces+=("$out/$name.h5")
done

policies=()
for policy in full random recent streamingllm h2o tova snapkv restkv; do
  policies+=(--policy "$policy")
done
run "$kvreplay" replay "${traces[@]}" "${policies[@]}" --capacity 64,128,25% \
  -o "$out/results.h5" --csv "$out/results.csv" --json "$out/results.json" --kept "$out/kept.h5"

cat <<EOF

In $out/: a trace per prompt (${traces[*]##*/}), the results as results.h5, results.csv and
results.json, and the sets that each policy kept in kept.h5. What to try next:
  $kvreplay inspect ${traces[0]}
  $kvreplay policies
  $kvreplay replay ${traces[0]} --policy snapkv --policy restkv --capacity 32,64,128,256,512
EOF
