#!/usr/bin/env bash
# Makes the Python virtual environment in which kvtrace-capture captures from Hugging Face models: PyTorch, transformers and
# the package in tracer/huggingface. Where it stands already and is what it should be, nothing is done; what cannot be
# finished leaves what was there before.
#   scripts/make-capture-environment.sh [FOLDER]   by default ~/.local/share/kvreplay/capture-environment
# PYTHON is the Python to make it with, python3 by default. PyTorch is the build that pip finds, which on Linux runs on NVIDIA
# GPUs and on CPUs. TORCH_INDEX names another package index to take PyTorch from, such as the one of its smaller builds for
# CPUs alone, or of another version of CUDA or ROCm (pytorch.org names them under "Get started").
set -euo pipefail

say() { printf 'make-capture-environment: %s\n' "$*"; }
die() {
  say "$@" >&2
  exit 1
}
usage() {
  echo "usage: $0 [FOLDER]" >&2
  exit 2
}

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
list=$scripts/capture-environment.txt
package=$scripts/../tracer/huggingface
[ $# -le 1 ] || usage
[[ ${1-} != -* ]] || usage
folder=${1-}
if [ -z "$folder" ]; then
  [ -n "${XDG_DATA_HOME-}${HOME-}" ] || die "neither XDG_DATA_HOME nor HOME is set: name a folder"
  folder=${XDG_DATA_HOME:-$HOME/.local/share}/kvreplay/capture-environment
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

# What an environment says that it was made from.
stamp=$folder/made-from.txt
made_from() {
  echo "# Python $version, PyTorch from ${TORCH_INDEX:-where pip looks}"
  cat "$list" "$package/pyproject.toml" "$package"/kvtrace/*.py
}
if [ -f "$stamp" ] && "$folder/bin/python" -c '' 2>/dev/null && [ "$(<"$stamp")" = "$(made_from)" ]; then
  say "$folder is up to date"
  exit 0
fi
# Only what this script has made is replaced.
[ ! -e "$folder" ] || [ -f "$stamp" ] || rmdir "$folder" 2>/dev/null ||
  die "$folder exists and is none of these environments: remove it, or name another folder"

# Debian and Ubuntu ship these apart from Python.
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python lacks the module venv: apt-get install python3-venv"

mkdir -p "$(dirname "$folder")" || die "$folder cannot be made there"
building=$folder.making-$$
trap 'rm -rf "$building"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "making $folder: takes minutes, and 5.5 GB of disk where PyTorch is its build for NVIDIA GPUs"
"$python" -m venv "$building" || die "$python could not make a virtual environment"
pip() { "$building/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
hint="pip could not install them: see above. It needs the network, or a mirror or folder that PIP_INDEX_URL or
PIP_FIND_LINKS names. Nothing was changed."
if [ -n "${TORCH_INDEX-}" ]; then
  pip --index-url "$TORCH_INDEX" "$(grep '^torch==' "$list")" || die "$hint"
fi
pip --only-binary :all: --no-compile --requirement "$list" || die "$hint"
# Building it leaves files beside the sources.
mkdir "$building/source"
cp -R "$package/pyproject.toml" "$package/README.md" "$package/kvtrace" "$building/source"
pip --no-deps --no-compile "$building/source" || die "$hint"
rm -rf "$building/source"

# It is made beside its place and moved there when it is whole; these are the files that name the place.
grep -rlIF "$building" "$building/bin" "$building/pyvenv.cfg" | while IFS= read -r file; do
  text=$(<"$file")
  printf '%s\n' "${text//"$building"/"$folder"}" >"$file"
done
"$building/bin/python" -c 'import kvtrace' || die "what was installed does not work"
made_from >"$building/made-from.txt"

rm -rf "$folder"
"$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$building" "$folder" || die "$folder cannot be put into its place"
say "made $folder; captures are made with $folder/bin/kvtrace-capture"
