#!/bin/sh
# strict_nvcc.sh NVCC ARGUMENTS...: compiles, and fails where ptxas says that it serialised or drained
# wgmma products (C75xx), which it takes for information.
log=$("$@" 2>&1)
status=$?
[ -z "$log" ] || printf '%s\n' "$log" >&2
case $log in
  *"(C75"*) exit 1 ;;
esac
exit $status
