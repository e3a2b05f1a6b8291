#!/usr/bin/env bash
# The project's own C++ files whose names match one of the patterns, each followed by a zero byte.
#   scripts/sources.sh '*.h' '*.cpp'
# Not from git, so that it works in an unpacked archive too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folders=()
for folder in src tracer analysis notebooks-export examples tests; do
  [ ! -d "$folder" ] || folders+=("$folder")
done
names=()
for pattern in "$@"; do
  names+=(-o -name "$pattern")
done
find "${folders[@]}" -type f \( "${names[@]:1}" \) -print0 | sort -z
