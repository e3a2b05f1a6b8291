#!/usr/bin/env bash
# Prefill and decode of `kvreplay capture` beside those of llama.cpp: same weights, same number of threads, in turns.
#   scripts/llama-cpp/compare.sh KVREPLAY LLAMA_CPP BUILD MODELS [PROMPT_TOKENS [GENERATED_TOKENS [THREADS [TURNS]]]]
# LLAMA_CPP is its source folder and BUILD a build of it with shared libraries (cmake -DGGML_NATIVE=ON, Release); MODELS is
# what make-model.py made. The machine should have nothing else to do.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
kvreplay=$1 source=$2 build=$3 models=$4
prompt=${5-512} generated=${6-16} threads=${7-$(nproc)} turns=${8-4}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${CXX-c++}" -O2 -std=c++20 "$(dirname "${BASH_SOURCE[0]}")/measure.cpp" -I"$source/include" -I"$source/ggml/include" \
  -L"$build/bin" -lllama -lggml -lggml-base -Wl,-rpath,"$(cd "$build" && pwd)/bin" -o "$folder/measure"
for ((i = 0; i < prompt; ++i)); do printf '%d ' $((3 + i * 7919 % 4000)); done >"$folder/ids"

for kind in f32 bf16; do
  for ((turn = 0; turn < turns; ++turn)); do
    echo "$kind llama.cpp $("$folder/measure" "$models/$kind.gguf" "$prompt" "$generated" "$threads")"
    # The first token comes from the prefill.
    "$kvreplay" capture --model "$models/$kind" --tokens "$folder/ids" --generate $((generated + 1)) --queries window:64 \
      -t "$threads" -o "$folder/trace.h5" 2>&1 >/dev/null |
      sed -n "s|^prefill: .*(\(.*\) tokens/s), decode: .*(\(.*\) tokens/s)$|$kind kvreplay prefill \1 decode \2|p"
    rm "$folder/trace.h5"
  done
done
