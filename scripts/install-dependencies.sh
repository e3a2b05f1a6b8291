#!/usr/bin/env bash
# Installs what the build needs and this machine lacks. Where nothing is missing it changes nothing and needs no rights.
#   scripts/install-dependencies.sh         the compiler, the build tools and the libraries
#   scripts/install-dependencies.sh --format      clang-format alone, for `make format` and `make check-format`
#   scripts/install-dependencies.sh --tidy        also what `make tidy` takes: clang for its headers, and Python's venv
#   scripts/install-dependencies.sh --fuzz        also what `make fuzz` takes: clang with libFuzzer and the sanitizers
#   scripts/install-dependencies.sh --ci          all of these, h5py, for the examples in Python, Open MPI, for the preset
#                                                 mpi, what reports are checked with: Chromium, and what an installation
#                                                 is: man, zsh and fish
#   scripts/install-dependencies.sh --benchmarks  also what the benchmarks compare (KVREPLAY_BENCHMARKS)
set -euo pipefail

say() { printf 'install-dependencies: %s\n' "$*"; }
die() {
  say "$@" >&2
  exit 1
}

packages=(
  g++ cmake ninja-build make pkg-config ccache
  libhdf5-dev libeigen3-dev libcli11-dev libfmt-dev nlohmann-json3-dev libxxhash-dev libhwy-dev
  libtomlplusplus-dev libsentencepiece-dev libpcre2-dev libutf8proc-dev libboost-dev libgtest-dev libgmock-dev
)
# ccache is a convenience: a build without it is only slower.
commands=(cmake ninja make pkg-config)
# What is looked for beside commands.
for_build=1
for_fuzzing=0
for_benchmarks=0
python_modules=()

for_tidy() {
  packages+=(clang libomp-dev python3 python3-venv)
  commands+=(clang++ python3)
  python_modules+=(ensurepip venv)
}
# clang brings neither libFuzzer's and the sanitizers' runtime (libclang-rt-dev) nor OpenMP's header (libomp-dev).
for_fuzz() {
  packages+=(clang libclang-rt-dev libomp-dev)
  commands+=(clang++)
  for_fuzzing=1
}

case "${1-}" in
  '') ;;
  --format)
    packages=(clang-format)
    commands=(clang-format)
    for_build=0
    ;;
  --tidy) for_tidy ;;
  --fuzz) for_fuzz ;;
  --ci)
    for_tidy
    for_fuzz
    packages+=(clang-format python3-h5py python3-numpy libopenmpi-dev openmpi-bin man-db zsh fish patch)
    commands+=(clang-format mpirun man zsh fish patch)
    python_modules+=(h5py numpy)
    # Ubuntu's is a snap, which a container does not run: reports are not checked there unless a browser is on the PATH.
    [ "$(sed -n 's/^ID=//p' /etc/os-release 2>/dev/null)" = ubuntu ] || {
      packages+=(chromium fonts-liberation)
      commands+=(chromium)
    }
    ;;
  --benchmarks)
    packages+=(libbenchmark-dev libopenblas-dev)
    for_benchmarks=1
    ;;
  *)
    echo "usage: $0 [--format | --tidy | --fuzz | --ci | --benchmarks]" >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Prints those of the packages that dpkg does not have.
missing_packages() {
  local installed
  # shellcheck disable=SC2016 # the ${} are dpkg-query's
  installed=$(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null |
    sed -n 's/^.i *//p') || true
  comm -23 <(printf '%s\n' "${packages[@]}" | sort -u) <(sort <<<"$installed")
}

# Whether the build would find everything, wherever it comes from (modules, conda, built by hand): asks CMake the
# questions of the project's own CMakeLists.txt, in a folder of its own.
probe() {
  local command folder status=0
  for command in "${commands[@]}"; do
    command -v "$command" >/dev/null || {
      echo "$command is not on the PATH"
      return 1
    }
  done
  [ $for_build -eq 1 ] || return 0
  folder=$(mktemp -d)
  {
    echo 'cmake_minimum_required(VERSION 3.25)'
    echo 'project(probe LANGUAGES C CXX)'
    grep -hE '^(find_package|find_path|find_library|pkg_check_modules|set\(HDF5_)' \
      "$root/CMakeLists.txt" "$root/tests/CMakeLists.txt"
    # There, what is missing is no error.
    [ $for_benchmarks -eq 0 ] || grep -hE '^(find_package|pkg_check_modules)' "$root/tests/benchmarks/CMakeLists.txt" |
      sed 's/ QUIET/ REQUIRED/'
  } >"$folder/CMakeLists.txt"
  cmake -G Ninja -S "$folder" -B "$folder/build" >"$folder/log" 2>&1 || {
    status=1
    local line
    line=$(grep -oE 'CMakeLists\.txt:[0-9]+' "$folder/log" | head -n 1)
    echo "CMake stops${line:+ at $(sed -n "${line#*:}p" "$folder/CMakeLists.txt")}"
  }
  if [ $status -eq 0 ] && [ $for_fuzzing -eq 1 ]; then
    echo '#include <omp.h>
extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return omp_get_max_threads() < 0; }' \
      >"$folder/probe.cpp"
    clang++ -fopenmp -fsanitize=address,undefined,fuzzer "$folder/probe.cpp" -o "$folder/probe" 2>"$folder/log" || {
      status=1
      grep -E 'error|cannot find' "$folder/log" | sed "s|$folder/||" | head -n 2
    }
  fi
  if [ $status -eq 0 ] && [ ${#python_modules[@]} -gt 0 ]; then
    python3 -c "import $(IFS=, && echo "${python_modules[*]}")" 2>"$folder/log" || {
      status=1
      tail -n 1 "$folder/log"
    }
  fi
  rm -rf "$folder"
  return $status
}

list_of_needs() {
  cat <<'EOF'
kvreplay needs: a C++20 compiler with OpenMP (GCC 12 or Clang 14, or newer), CMake 3.25, Ninja, make, pkg-config, HDF5 1.10,
  Eigen 3.4, CLI11 2.1, fmt 9, nlohmann-json 3.11, toml++ 3.3, xxHash, Highway 1.0.3, SentencePiece, PCRE2 10.40, utf8proc,
  Boost 1.74 and GoogleTest 1.12, or newer. ccache is optional.
  `make format` and `make check-format` need clang-format alone; `make tidy` clang, libomp and Python with venv as well;
  `make fuzz` clang, compiler-rt and libomp; .ci/run also h5py, an MPI, Chromium, man, zsh, fish and patch; the benchmarks Google
  Benchmark and OpenBLAS.
Installed on Debian 12, Ubuntu 24.04 and newer by this script; elsewhere by you, where CMake and pkg-config find them
  (CMAKE_PREFIX_PATH, PKG_CONFIG_PATH).
EOF
}

missing=()
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -gt 0 ] || exit 0
  has_apt=1
else
  has_apt=0
fi

if reason=$(probe); then
  say "everything is here${missing[*]:+, though not as the packages ${missing[*]}}"
  exit 0
fi

if [ $has_apt -eq 0 ]; then
  list_of_needs >&2
  die "this system has no apt, so nothing was installed. $reason"
fi

# Older releases carry a CMake and libraries that the build would refuse.
id=$(sed -n 's/^ID=//p' /etc/os-release 2>/dev/null | tr -d '"')
release=$(sed -n 's/^VERSION_ID=//p' /etc/os-release 2>/dev/null | tr -d '"')
case "$id" in
  debian) oldest=12 ;;
  ubuntu) oldest=24.04 ;;
  *) oldest= ;; # a derivative: its apt says what it has
esac
if [ -n "$oldest" ] && [ -n "$release" ] && dpkg --compare-versions "$release" lt "$oldest"; then
  list_of_needs >&2
  die "$id $release is not supported: its packages are too old ($id $oldest or newer is). Nothing was installed."
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || die "missing: ${missing[*]}
Neither root nor sudo here. Ask an administrator for:
  apt-get install --no-install-recommends ${missing[*]}"
  as_root=(sudo)
fi

say "installing ${missing[*]}${as_root[*]:+ (with sudo)}"
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" \
    </dev/null
}
apt update || say "apt-get update failed; trying with the package lists at hand"
apt install --no-install-recommends "${missing[@]}" || die "apt-get could not install: ${missing[*]}"
