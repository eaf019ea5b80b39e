# Shared by the launch scripts; sourced, not run.
set -euo pipefail

# need NAME MEANING: fails unless the variable is set and not empty.
need() {
  if [[ -z "${!1:-}" ]]; then
    echo "error: set $1: $2" >&2
    exit 2
  fi
}

# need_command NAME: fails unless the program is installed; with DRY_RUN=1 does nothing.
need_command() {
  if [[ -z "${DRY_RUN:-}" ]] && ! command -v "$1" >/dev/null; then
    echo "error: $1 is not installed" >&2
    exit 2
  fi
}

# run COMMAND...: prints the command, then runs it; with DRY_RUN=1 only prints it.
run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

# until_finished FUNCTION [ARGUMENT...]: repeats the function after a preemption or a kill until
# `finished` succeeds. Stops at an error (status 1 or 2), which needs a person, and after RESTARTS
# restarts (default 100).
until_finished() {
  local status attempt
  for ((attempt = 0; attempt <= ${RESTARTS:-100}; attempt++)); do
    status=0
    "$@" || status=$?
    if [[ -n "${DRY_RUN:-}" ]] || finished; then return 0; fi
    if [[ $status == 1 || $status == 2 ]]; then
      echo "error: the run failed with status $status; see its message above" >&2
      return "$status"
    fi
    echo "stopped with status $status before its end: resuming (restart $((attempt + 1)))" >&2
  done
  echo "error: still not finished after ${RESTARTS:-100} restarts" >&2
  return 1
}
