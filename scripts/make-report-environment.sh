#!/usr/bin/env bash
# Makes the Python virtual environment with which `kvreplay report` draws its figures and in which its notebooks run. Where
# it stands already and is what it should be, nothing is done; what cannot be finished leaves what was there before.
#   scripts/make-report-environment.sh [FOLDER]   by default where kvreplay looks for it
#   scripts/make-report-environment.sh --checks [FOLDER]   also what scripts/check-report.py drives a browser with
# PYTHON is the Python to make it with, python3 by default.
set -euo pipefail

say() { printf 'make-report-environment: %s\n' "$*"; }
die() {
  say "$@" >&2
  exit 1
}
usage() {
  echo "usage: $0 [--checks] [FOLDER]" >&2
  exit 2
}

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lists=("$scripts/report-environment.txt")
checks=0
if [ "${1-}" = --checks ]; then
  checks=1
  lists+=("$scripts/report-checks.txt")
  shift
fi
[ $# -le 1 ] || usage
[[ ${1-} != -* ]] || usage
folder=${1-}
if [ -z "$folder" ]; then
  [ -n "${XDG_DATA_HOME-}${HOME-}" ] || die "neither XDG_DATA_HOME nor HOME is set: name a folder"
  folder=${XDG_DATA_HOME:-$HOME/.local/share}/kvreplay/report-environment
fi
case $folder in
  /*) ;;
  *) folder=$PWD/$folder ;;
esac
folder=${folder%/}

python=${PYTHON-python3}
command -v "$python" >/dev/null || die "there is no $python: install Python 3.11 or newer, or name it with PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$python does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$python is Python $version, and 3.11 or newer is needed: name one with PYTHON=..."

# What an environment says that it was made from. One that has the checks' packages too serves without them as well.
stamp=$folder/made-from.txt
made_from() { { echo "# Python $version" && cat "$@"; }; }
if [ -f "$stamp" ] && "$folder/bin/python" -c '' 2>/dev/null; then
  have=$(<"$stamp")
  [ "$have" = "$(made_from "${lists[@]}")" ] || { [ $checks -eq 0 ] &&
    [ "$have" = "$(made_from "$scripts"/report-environment.txt "$scripts"/report-checks.txt)" ]; } && {
    say "$folder is up to date"
    exit 0
  }
fi
# Only what this script has made is replaced.
[ ! -e "$folder" ] || [ -f "$stamp" ] || rmdir "$folder" 2>/dev/null ||
  die "$folder exists and is none of these environments: remove it, or name another folder"

# Debian and Ubuntu ship these apart from Python.
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python lacks the module venv: apt-get install python3-venv (or let scripts/install-dependencies.sh --ci do it)"

mkdir -p "$(dirname "$folder")" || die "$folder cannot be made there"
building=$folder.making-$$
trap 'rm -rf "$building"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "making $folder: downloads $((checks ? 130 : 80)) MB, takes $((checks ? 560 : 395)) MB"
"$python" -m venv "$building" || die "$python could not make a virtual environment"
requirements=()
for list in "${lists[@]}"; do
  requirements+=(--requirement "$list")
done
"$building/bin/python" -m pip --disable-pip-version-check install --quiet --only-binary :all: --no-compile \
  "${requirements[@]}" ||
  die "pip could not install them: see above. It needs the network, or a mirror or folder that PIP_INDEX_URL or
PIP_FIND_LINKS names. Nothing was changed."

# It is made beside its place and moved there when it is whole; these are the files that name the place.
grep -rlIF "$building" "$building/bin" "$building/pyvenv.cfg" | while IFS= read -r file; do
  text=$(<"$file")
  printf '%s\n' "${text//"$building"/"$folder"}" >"$file"
done
"$building/bin/python" -m compileall -q -j 0 -s "$building" -p "$folder" "$building"/lib/python*/site-packages >/dev/null ||
  true # only slower at its first use
"$building/bin/python" -c 'import altair, ipykernel, nbconvert, pandas, vl_convert' || die "what was installed does not work"
made_from "${lists[@]}" >"$building/made-from.txt"

rm -rf "$folder"
"$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$building" "$folder" || die "$folder cannot be put into its place"
say "made $folder"
