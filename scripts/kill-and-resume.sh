#!/usr/bin/env bash
# Kills a sweep at random moments, resumes it, and compares what it writes with what an uninterrupted one writes, byte for
# byte. The moments follow from SEED, as far as the machine's speed allows.
#   scripts/kill-and-resume.sh KVREPLAY [TRACES...]
#   KILLS=20 SEED=1 scripts/kill-and-resume.sh build/release-native/kvreplay out/demo/play.h5
# Without traces it takes those that `make demo` leaves in out/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvreplay=$1
shift
traces=("$@")
if [ ${#traces[@]} -eq 0 ]; then
  # The demo's folder also holds its results.
  for prompt in traces/prompts/*.txt; do
    traces+=("out/demo/$(basename "$prompt" .txt).h5")
  done
fi
kills=${KILLS-20}
RANDOM=${SEED-1}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sweep=("$kvreplay" sweep "${traces[@]}" --policy 'restkv(alpha={0.1:0.9:0.2},window={16,32})' --policy snapkv --policy h2o
  --policy random 'snapkv+every(16)' 'cake+every(interval=16,slack=8)' --capacity '64,256')

start=$(date +%s%N)
"${sweep[@]}" -o "$folder/whole.h5" >"$folder/log" 2>&1 || {
  cat "$folder/log" >&2
  exit 1
}
milliseconds=$((($(date +%s%N) - start) / 1000000))
echo "kill-and-resume: uninterrupted in $milliseconds ms; ${#traces[@]} traces, $kills kills"

killed=0
finished=0
units=0
while [ $((killed + finished)) -lt "$kills" ]; do
  # Most kills hit early in a run, so that one sweep survives several of them before it is done.
  delay=$((RANDOM * milliseconds * (1 + RANDOM % 4) / (4 * 32768)))
  "${sweep[@]}" -o "$folder/killed.h5" --resume >"$folder/log" 2>&1 &
  process=$!
  sleep "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))"
  kill -9 "$process" 2>/dev/null || true
  if wait "$process" 2>/dev/null; then
    # It was faster. Compared, and begun again for the next kill.
    finished=$((finished + 1))
    cmp "$folder/whole.h5" "$folder/killed.h5"
    rm "$folder/killed.h5"
  else
    grep -q '^kvreplay: ' "$folder/log" && {
      cat "$folder/log" >&2
      exit 1
    }
    killed=$((killed + 1))
    [ ! -e "$folder/killed.h5" ] || cmp "$folder/whole.h5" "$folder/killed.h5"
    found=$({ find "$folder/killed.h5.units" -name 'unit-*.h5' 2>/dev/null || true; } | wc -l)
    units=$((units > found ? units : found))
  fi
done
"${sweep[@]}" -o "$folder/killed.h5" --resume >"$folder/log" 2>&1
cmp "$folder/whole.h5" "$folder/killed.h5"
[ ! -e "$folder/killed.h5.units" ]
[ "$killed" -gt 0 ] || {
  echo 'kill-and-resume: the sweep was always faster than the kill; take longer traces' >&2
  exit 1
}
echo "kill-and-resume: killed $killed times (with up to $units units finished), $finished times it was faster; the same bytes"
