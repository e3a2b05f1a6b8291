#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy on the project's sources; headers are seen through the files that include them.
#   scripts/tidy.sh BUILD_FOLDER JOBS
# A new clang-tidy, from PyPI into the build folder: those of Debian and Ubuntu look through all system headers for what they
# then do not report, and take four times as long.
# The tests are left out: they would double the time, and GoogleTest's macros trip several checks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$PWD/$1
jobs=$2
version=23.1.4

tools=$build/clang-tidy-$version
if [ ! -x "$tools/bin/clang-tidy" ]; then
  rm -rf "$tools"
  { python3 -m venv "$tools" && "$tools/bin/python" -m pip --disable-pip-version-check install --quiet \
    --only-binary :all: "clang-tidy==$version"; } || {
    rm -rf "$tools"
    echo "tidy: clang-tidy $version cannot be installed: see above; it takes Python with venv, and PyPI or a mirror of it" >&2
    exit 1
  }
fi
# It comes without OpenMP's header.
mkdir -p "$tools/include"
ln -sf "$(clang++ -print-resource-dir)/include/omp.h" "$tools/include/omp.h"

# Per file: the findings, and nothing else, unless clang-tidy fails without saying so among them.
check() {
  local log=$1/kvreplay-tidy.$$
  # The commands are GCC's, and may name warnings that clang does not know; its library uses what it declares deprecated.
  "$3/bin/clang-tidy" -p "$1" --quiet --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-Wno-deprecated-declarations --extra-arg="-isystem$3/include" "$2" >"$log.out" 2>"$log.err" || {
    cat "$log.out"
    [ -s "$log.out" ] || cat "$log.err"
    failed=1
  }
  rm -f "$log.out" "$log.err"
  return "${failed:-0}"
}
export -f check

# shellcheck disable=SC2016 # $1 to $3 are the inner shell's
scripts/sources.sh '*.cpp' | grep -zv '^tests/' | xargs -0 -P "$jobs" -n 1 bash -c 'check "$1" "$3" "$2"' check "$build" "$tools" || {
  echo "tidy: findings above" >&2
  exit 1
}
