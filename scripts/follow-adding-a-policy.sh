#!/usr/bin/env bash
# Follows docs/adding-a-policy.md to the letter in a copy of this checkout: writes the files that it shows (a line with
# nothing but `path`: stands before each) and runs its sh blocks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
page=docs/adding-a-policy.md
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

tar -c --exclude=./.git --exclude=./build --exclude='./build-*' --exclude=./out . | tar -x -C "$copy"
cd "$copy"
awk '
  /^```/ && into != "" { close(into); into = ""; next }
  /^```cpp$/ && path != "" { into = path; files++; path = ""; printf "" >into; next }
  /^```sh$/ { into = "commands"; commands++; next }
  into != "" { print >>into; next }
  /^`[^`]+`:$/ { path = substr($0, 2, length($0) - 3) }
  END { exit files == 2 && commands == 1 ? 0 : 1 }
' "$page" || {
  echo "$page: a policy, its test and the commands to try them are expected, a block each" >&2
  exit 1
}
# What is copied from the page should pass make check-format.
# shellcheck disable=SC2016 # the backquotes are Markdown's
mapfile -t files < <(sed -n 's/^`\([^`]*\)`:$/\1/p' "$page")
clang-format --dry-run --Werror "${files[@]}"
bash -exo pipefail commands
