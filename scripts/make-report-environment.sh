#!/usr/bin/env bash
# Makes the Python virtual environment with which `kvreplay report` draws its figures and in which its notebooks run. Where
# it stands already and is what it should be, nothing is done; what cannot be finished leaves what was there before.
#   scripts/make-report-environment.sh [FOLDER]   by default where kvreplay looks for it
#   scripts/make-report-environment.sh --checks [FOLDER]   also what scripts/check-report.py drives a browser with
# PYTHON is the Python to make it with, python3 by default.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/virtual-environment.sh
. "$scripts/virtual-environment.sh"

lists=("$scripts/report-environment.txt")
both=("$scripts/report-environment.txt" "$scripts/report-checks.txt")
size='downloads 80 MB, takes 395 MB'
if [ "${1-}" = --checks ]; then
  lists=("${both[@]}")
  size='downloads 130 MB, takes 560 MB'
  shift
fi
if [ $# -gt 1 ] || [[ ${1-} == -* ]]; then
  echo "usage: $0 [--checks] [FOLDER]" >&2
  exit 2
fi
choose_folder report-environment "${1-}"
choose_python

made_from() { echo "# Python $version" && cat "$@"; }
# One that has the checks' packages too serves without them as well.
if stands_made_from "$(made_from "${lists[@]}")" || stands_made_from "$(made_from "${both[@]}")"; then
  say "$folder is up to date"
  exit 0
fi

begin_environment "making $folder: $size"
pip_install --only-binary :all: "${lists[@]/#/--requirement=}"
"$building/bin/python" -m compileall -q -j 0 -s "$building" -p "$folder" "$building"/lib/python*/site-packages >/dev/null ||
  true # only slower at its first use
finish_environment "$(made_from "${lists[@]}")" altair ipykernel nbconvert pandas vl_convert
say "made $folder"
