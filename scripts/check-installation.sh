#!/usr/bin/env bash
# Whether an installation is whole: the program runs, man shows its page, the three shells complete its command lines, and
# what the README links to is there.
#   scripts/check-installation.sh PREFIX
set -euo pipefail
prefix=$(realpath "$1")
kvreplay=$prefix/bin/kvreplay
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
touch "$folder/trace.h5"

die() {
  echo "check-installation: $*" >&2
  exit 1
}

version=$("$kvreplay" --version)
page=$(MANWIDTH=100 man -l "$prefix/share/man/man1/kvreplay.1" 2>"$folder/warnings")
[ ! -s "$folder/warnings" ] || die "man warns: $(head -n 1 "$folder/warnings")"
for word in "$version" 'kvreplay sweep' --capacity 'EXIT STATUS'; do
  grep -qF -- "$word" <<<"$page" || die "the manual page lacks '$word'"
done

doc=$prefix/share/doc/kvreplay
for page in "$doc"/README.md "$doc"/docs/*.md "$doc"/examples/*/README.md; do
  while read -r link; do
    target=$(dirname "$page")/${link%%#*}
    [ -e "$target" ] || echo "${page#"$doc/"}: $link"
  done < <(grep -oP '\]\(\K[^)#: ]+(?=[)#])' "$page")
done >"$folder/missing"
# What only the sources have.
grep -v 'scripts/\|src/\|tests/\|findings\|tracer/\|traces/prompts' "$folder/missing" && die 'links above lead nowhere'

# Each prints what it offers for "kvreplay replay trace.h5 --policy snapk" and "kvreplay replay tr", a word in a line.
for_bash() {
  # shellcheck disable=SC2016 # the ${} are the inner shell's
  bash -c '. "$1/share/bash-completion/completions/kvreplay"
    COMP_WORDS=(kvreplay replay trace.h5 --policy snapk); COMP_CWORD=4; _kvreplay "$2"; printf "%s\n" "${COMPREPLY[@]}"
    COMP_WORDS=(kvreplay replay tr); COMP_CWORD=2; _kvreplay "$2"; printf "%s\n" "${COMPREPLY[@]}"' bash "$prefix" "$kvreplay"
}
# zsh shows candidates to a terminal alone: to that of a pseudo-terminal here.
for_zsh() {
  cat >"$folder/complete.zsh" <<'END'
zmodload zsh/zpty
complete() {  # LINE LAST: shows what is offered for LINE, until LAST is
  local reply shown= wait
  zpty shell zsh -f -i
  zpty -w shell 'PROMPT= LISTMAX=9999 COLUMNS=200; path=("$PREFIX/bin" $path); fpath=("$PREFIX/share/zsh/site-functions" $fpath)'
  zpty -w shell 'autoload -Uz compinit; compinit -u -D; setopt auto_list no_list_ambiguous no_beep; echo rea''dy'
  while zpty -r shell reply && [[ $reply != *ready* ]]; do :; done
  zpty -n -w shell "$1"$'\t'
  for ((wait = 0; wait < 600; ++wait)); do
    while zpty -r -t shell reply; do shown+=$reply; done
    [[ $shown != *$2* ]] || break
    sleep 0.1
  done
  print -r -- "$shown"
  zpty -d shell
}
complete 'kvreplay replay trace.h5 --policy snapk' snapkv@rest-kv
complete 'kvreplay replay tr' trace.h5
END
  PREFIX=$prefix zsh -f "$folder/complete.zsh" | grep -oE 'snapkv(@[a-z-]+)?|trace\.h5' | sort -u
}
for_fish() {
  # shellcheck disable=SC2016 # the $ are fish's
  HOME=$folder PREFIX=$prefix fish --no-config -c 'set -x PATH $PREFIX/bin $PATH
    source $PREFIX/share/fish/vendor_completions.d/kvreplay.fish
    complete -C "kvreplay replay trace.h5 --policy snapk"; complete -C "kvreplay replay tr"' | cut -f 1
}
for shell in bash zsh fish; do
  offered=$(cd "$folder" && "for_$shell" | tr -d '\r')
  for word in snapkv snapkv@kvpress trace.h5; do
    grep -qxF -- "$word" <<<"$offered" || die "$shell does not offer '$word' but: ${offered//$'\n'/, }"
  done
done
echo "check-installation: $version in $prefix is whole"
