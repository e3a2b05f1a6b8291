#!/usr/bin/env bash
# The whole way once: captures the demo model on the bundled prompts, replays policies over what was captured, makes a
# report of the results, and lets the model itself run on over what the policies kept. Commands are shown so that they can
# be pasted where the user is.
#   scripts/demo.sh KVREPLAY [FOLDER]    KVREPLAY from the project's folder; FOLDER: where the user is, by default there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvreplay=$1
from=${2:-$PWD}
out=out/demo
mkdir -p "$out"

# A word as it is typed in the user's folder: the program and the demo's files are in this one.
typed() {
  local word=$1
  case $word in
    "$kvreplay" | traces/* | "$out" | "$out"/*)
      [ "$from" -ef . ] || word=$(realpath -ms --relative-to="$from" "$word")
      # Without a slash it would be looked for on the PATH.
      [[ $1 != "$kvreplay" || $word == */* ]] || word=./$word
      ;;
  esac
  [[ $word =~ ^[A-Za-z0-9_./,:=%+@-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
  printf '%s' "$word"
}

command_line() {
  local line='' word
  for word in "$@"; do line+=" $(typed "$word")"; done
  printf '%s' "${line# }"
}

run() {
  printf '\n$ %s\n' "$(command_line "$@")" >&2
  "$@"
}

traces=()
for prompt in traces/prompts/*.txt; do
  name=$(basename "$prompt" .txt)
  run "$kvreplay" capture --model traces/demo-model --prompt "$prompt" --spans "${prompt%.txt}.spans.json" --generate 32 \
    -o "$out/$name.h5"
  traces+=("$out/$name.h5")
done

# What each step of ReST-KV does, and its two parameters together; the policies of the replay below are not repeated.
run "$kvreplay" sweep "${traces[@]}" --capacity 128 -o "$out/settings.h5" \
  --policy 'restkv(temporal={mean,last,reversed-ema})' --policy 'restkv(spatial={none,avg,max})' \
  --policy 'restkv(metric=before)' --policy 'restkv(projection=false)' --policy 'restkv(window={16,64})' \
  --policy 'attention(temporal=ema,spatial=adaptive)' --policy 'restkv(alpha={0.1:0.9:0.2},beta={10,30,100,300,2000})'

policies=()
for policy in random recent streamingllm h2o tova snapkv restkv; do
  policies+=(--policy "$policy")
done
# The same prompt, evicted from earlier and earlier.
run "$kvreplay" replay "$out/play.h5" "${policies[@]}" --capacity 256 --evict-at 512,768,1024,1280,1536 \
  -o "$out/earlier.h5" --kept "$out/earlier-kept.h5"

run "$kvreplay" replay "${traces[@]}" --policy full "${policies[@]}" --policy oracle-reconstruction \
  --capacity 64,128,256,512 --rank-agreement \
  -o "$out/results.h5" --csv "$out/results.csv" --json "$out/results.json" --kept "$out/kept.h5"

run "$kvreplay" report "$out/results.h5" "$out/settings.h5" "$out/earlier.h5" --kept "$out/kept.h5" \
  --kept "$out/earlier-kept.h5" --trace "${traces[@]}" --force -o "$out/report"

# What the model itself loses: it runs on over what each policy kept of two of the prompts.
run "$kvreplay" live --model traces/demo-model --trace "$out/facts.h5" "$out/needle.h5" "${policies[@]}" \
  --capacity 64,128,256 -o "$out/live.h5"

cat <<EOF

In $(typed "$out")/: a trace per prompt (${traces[*]##*/}), the results as results.h5, results.csv and
results.json, the sets that each policy kept in kept.h5, what the model loses in live.h5, and the report. What to try next:
  $(command_line "$kvreplay" inspect "${traces[0]}")
  $(command_line "$kvreplay" analyze "$out/results.h5" --by policy,capacity,layer)
  $(command_line "$kvreplay" policies)
  $(command_line "$kvreplay" replay "${traces[0]}" --policy snapkv --policy restkv --capacity 32,64,128,256,512)

The report: $(typed "$out/report/index.html")
EOF
