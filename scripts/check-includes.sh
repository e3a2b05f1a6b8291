#!/usr/bin/env bash
# Includes lead in one direction only: between the folders, and between the files of src/replay (a header and the .cpp
# beside it are one). Policies know neither traces nor the replay, and of what is built on src only the command line
# knows. Names what is against that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# "who whom" for every #include "folder/file" in the folders given.
includes() {
  grep -RoP --include='*.h' --include='*.cpp' '^#include "\K[^"/]+/[^"]+' "$@" | sed 's|^src/||; s|:| |'
}

all=$(includes src tracer analysis notebooks-export)
failed=0

# Takes what is against a rule from standard input.
report() {
  local found
  found=$(cat)
  [ -z "$found" ] && return
  printf '%s:\n%s\n' "$1" "$found" >&2
  failed=1
}

# The members of a loop among pairs, as tsort names them.
loop() { awk '$1 != $2' | sort -u | tsort 2>&1 >/dev/null | sed -n 's|^tsort: \([^-]\)|  \1|p' || true; }

report 'these folders include each other in a circle' < <(sed -E 's|([^ /]+)/[^ ]*|\1|g' <<<"$all" | loop)
report 'these files of src/replay include each other in a circle' < <(
  grep -P '^replay/.* replay/' <<<"$all" | sed -E 's/\.(h|cpp)( |$)/\2/g' | loop
)
report 'a policy must know neither traces nor the replay' < <(grep -P '^policy/.* (trace|replay)/' <<<"$all")
report 'only src/cli may include what is built on src' < <(
  grep -P '^(base|hdf5|kernels|trace|policy|replay|sweep)/.* (tracer|analysis|notebooks-export|cli)/' <<<"$all"
)
exit $failed
