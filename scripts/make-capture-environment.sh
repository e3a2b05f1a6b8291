#!/usr/bin/env bash
# Makes the Python virtual environment in which kvtrace-capture captures from Hugging Face models: PyTorch, transformers and
# the package in tracer/huggingface. Where it stands already and is what it should be, nothing is done; what cannot be
# finished leaves what was there before.
#   scripts/make-capture-environment.sh [FOLDER]   by default ~/.local/share/kvreplay/capture-environment
# PYTHON is the Python to make it with, python3 by default. PyTorch is the build that pip finds, which on Linux runs on NVIDIA
# GPUs and on CPUs. TORCH_INDEX names another package index to take PyTorch from, such as the one of its smaller builds for
# CPUs alone, or of another version of CUDA or ROCm (pytorch.org names them under "Get started").
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/virtual-environment.sh
. "$scripts/virtual-environment.sh"

if [ $# -gt 1 ] || [[ ${1-} == -* ]]; then
  echo "usage: $0 [FOLDER]" >&2
  exit 2
fi
list=$scripts/capture-environment.txt
package=$scripts/../tracer/huggingface
choose_folder capture-environment "${1-}"
choose_python

made_from=$(
  echo "# Python $version, PyTorch from ${TORCH_INDEX:-where pip looks}"
  cat "$list" "$package/pyproject.toml" "$package"/kvtrace/*.py
)
if stands_made_from "$made_from"; then
  say "$folder is up to date"
  exit 0
fi

begin_environment \
  "making $folder: takes minutes, and 5.5 GB of disk where PyTorch is its build for NVIDIA GPUs"
[ -z "${TORCH_INDEX-}" ] || pip_install --index-url "$TORCH_INDEX" "$(grep '^torch==' "$list")"
pip_install --only-binary :all: --requirement "$list"
# Building it leaves files beside the sources.
mkdir "$building/source"
cp -R "$package/pyproject.toml" "$package/README.md" "$package/kvtrace" "$building/source"
pip_install --no-deps "$building/source"
rm -rf "$building/source"
finish_environment "$made_from" kvtrace
say "made $folder; captures are made with $folder/bin/kvtrace-capture"
