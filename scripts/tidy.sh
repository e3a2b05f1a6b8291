#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy on the project's sources; headers are seen through the files that include them.
#   scripts/tidy.sh BUILD_FOLDER JOBS
# The tests are left out: they would double the time, and GoogleTest's macros trip several checks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$1
jobs=$2

# Per file: the findings, and nothing else, unless clang-tidy fails without saying so among them.
check() {
  local log=$1/kvreplay-tidy.$$
  # The commands are GCC's, and may name warnings that clang does not know.
  clang-tidy -p "$1" --quiet --extra-arg=-Wno-unknown-warning-option "$2" >"$log.out" 2>"$log.err" || {
    cat "$log.out"
    [ -s "$log.out" ] || cat "$log.err"
    failed=1
  }
  rm -f "$log.out" "$log.err"
  return "${failed:-0}"
}
export -f check

# shellcheck disable=SC2016 # $1 and $2 are the inner shell's
scripts/sources.sh '*.cpp' | grep -zv '^tests/' | xargs -0 -P "$jobs" -n 1 bash -c 'check "$1" "$2"' check "$build" || {
  echo "tidy: findings above" >&2
  exit 1
}
