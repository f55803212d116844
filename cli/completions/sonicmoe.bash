# bash completion of sonicmoe: source it, or put it where bash-completion looks.
_sonicmoe() {
  local IFS=$'\n'
  COMPREPLY=($("$1" complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _sonicmoe sonicmoe
