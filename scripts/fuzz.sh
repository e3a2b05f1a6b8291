#!/usr/bin/env bash
# Runs every fuzz target that was built, each with its corpus tests/fuzz/corpus/<name>/ (<name>: the target's, without a
# leading fuzz_). An input that breaks a target is kept under BUILD_FOLDER/findings/.
#   scripts/fuzz.sh BUILD_FOLDER RUNS JOBS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$1
export build runs=$2
jobs=$3

check() {
  local target=$1 name seconds=$SECONDS
  name=$(basename "$target")
  name=${name#fuzz_}
  # libFuzzer writes what it discovers to the first folder; the tracked corpus is only read.
  local corpora=("$build/corpus/$name")
  mkdir -p "${corpora[0]}" "$build/findings"
  [ ! -d "tests/fuzz/corpus/$name" ] || corpora+=("tests/fuzz/corpus/$name")
  if "$target" -runs="$runs" -timeout=20 -artifact_prefix="$build/findings/$name-" "${corpora[@]}" \
    >"$build/$name.log" 2>&1 </dev/null; then
    echo "fuzz: $name: $runs runs, nothing found, $((SECONDS - seconds)) s"
  else
    tail -n 60 "$build/$name.log"
    echo "fuzz: $name: FAILED, the whole log is in $build/$name.log"
    return 1
  fi
}
export -f check

targets=$(find "$build/tests/fuzz" -maxdepth 1 -type f -executable | sort)
if [ -z "$targets" ]; then
  echo "fuzz: no targets in $build/tests/fuzz" >&2
  exit 1
fi
# shellcheck disable=SC2016 # $1 is the inner shell's
xargs -P "$jobs" -n 1 bash -c 'check "$1"' check <<<"$targets"
