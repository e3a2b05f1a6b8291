#!/usr/bin/env bash
# Follows pages that add to the program to the letter, one after the other in a copy of this checkout: writes the files
# that they show (a line with nothing but `path`: stands before each), makes the changes (diff blocks) and runs the sh
# block.
#   scripts/follow-pages.sh [PAGE...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- docs/adding-a-policy.md docs/adding-a-measure.md
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

tar -c --exclude=./.git --exclude=./build --exclude='./build-*' --exclude=./out . | tar -x -C "$copy"
cd "$copy"
for page in "$@"; do
  rm -f commands changes
  awk '
    /^```/ && into != "" { close(into); into = ""; next }
    /^```cpp$/ && path != "" { into = path; files++; path = ""; printf "" >into; next }
    /^```diff$/ { into = "changes"; files++; next }
    /^```sh$/ { into = "commands"; commands++; next }
    into != "" { print >>into; next }
    /^`[^`]+`:$/ { path = substr($0, 2, length($0) - 3) }
    END { exit files == 2 && commands == 1 ? 0 : 1 }
  ' "$page" || {
    echo "$page: what is added, its test and the commands to try them are expected, a block each" >&2
    exit 1
  }
  # shellcheck disable=SC2016 # the backquotes are Markdown's
  mapfile -t files < <(sed -n 's/^`\([^`]*\)`:$/\1/p' "$page")
  if [ -e changes ]; then
    patch --strip=1 --fuzz=0 <changes
    mapfile -t -O "${#files[@]}" files < <(sed -n 's|^+++ b/||p' changes)
  fi
  # What is copied from the page should pass make check-format.
  clang-format --dry-run --Werror "${files[@]}"
  bash -exo pipefail commands
done
