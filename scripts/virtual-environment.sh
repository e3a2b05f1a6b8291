# shellcheck shell=bash
# What the scripts that make Python virtual environments have in common. Sourced by them, in this order:
#   choose_folder NAME [FOLDER]   sets `folder`, by default ~/.local/share/kvreplay/NAME
#   choose_python                 sets `python`, from PYTHON, and `version`
#   stands_made_from TEXT         whether `folder` is an environment that works and says that it was made from TEXT
#   begin_environment MESSAGE     makes an empty one in `building`, beside its place, unless something else stands there
#   pip_install ARGUMENT...       installs into it
#   finish_environment TEXT MODULE...   tries to import the modules, and puts it into its place, with TEXT
# Whatever fails ends the script with one line and leaves what was there before.

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*"; }
die() {
  say "$@" >&2
  exit 1
}

choose_folder() {
  folder=${2-}
  if [ -z "$folder" ]; then
    [ -n "${XDG_DATA_HOME-}${HOME-}" ] || die "neither XDG_DATA_HOME nor HOME is set: name a folder"
    folder=${XDG_DATA_HOME:-$HOME/.local/share}/kvreplay/$1
  fi
  case $folder in
    /*) ;;
    *) folder=$PWD/$folder ;;
  esac
  folder=${folder%/}
}

choose_python() {
  python=${PYTHON-python3}
  command -v "$python" >/dev/null || die "there is no $python: install Python 3.11 or newer, or name it with PYTHON=..."
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$python does not run"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is Python $version, and 3.11 or newer is needed: name one with PYTHON=..."
}

stands_made_from() {
  [ -f "$folder/made-from.txt" ] && "$folder/bin/python" -c '' 2>/dev/null && [ "$(<"$folder/made-from.txt")" = "$1" ]
}

begin_environment() {
  # Only what such a script has made is replaced.
  [ ! -e "$folder" ] || [ -f "$folder/made-from.txt" ] || rmdir "$folder" 2>/dev/null ||
    die "$folder exists and is none of these environments: remove it, or name another folder"
  # Debian and Ubuntu ship these apart from Python.
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python lacks the module venv: apt-get install python3-venv (or let scripts/install-dependencies.sh --ci do it)"
  mkdir -p "$(dirname "$folder")" || die "$folder cannot be made there"
  building=$folder.making-$$
  trap 'rm -rf "$building"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  say "$1"
  "$python" -m venv "$building" || die "$python could not make a virtual environment"
}

pip_install() {
  "$building/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile "$@" ||
    die "pip could not install them: see above. It needs the network, or a mirror or folder that PIP_INDEX_URL or
PIP_FIND_LINKS names. Nothing was changed."
}

finish_environment() {
  local text=$1 file module content
  shift
  # It is made beside its place and moved there when it is whole; these are the files that name the place.
  grep -rlIF "$building" "$building/bin" "$building/pyvenv.cfg" | while IFS= read -r file; do
    content=$(<"$file")
    printf '%s\n' "${content//"$building"/"$folder"}" >"$file"
  done
  for module in "$@"; do
    "$building/bin/python" -c "import $module" || die "what was installed does not work"
  done
  printf '%s\n' "$text" >"$building/made-from.txt"
  rm -rf "$folder"
  "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$building" "$folder" ||
    die "$folder cannot be put into its place"
}
