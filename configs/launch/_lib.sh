# Shared by the launch scripts; sourced, not run.
set -euo pipefail

# need NAME "what it is": the variable must be set and not empty.
need() {
  if [[ -z "${!1:-}" ]]; then
    echo "error: set $1: $2" >&2
    exit 2
  fi
}

# need_command NAME: a program that must be installed (unless nothing is going to be run).
need_command() {
  if [[ -z "${DRY_RUN:-}" ]] && ! command -v "$1" >/dev/null; then
    echo "error: $1 is not installed" >&2
    exit 2
  fi
}

# run COMMAND...: says it, then does it; with DRY_RUN=1 only says it.
run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

# until_finished FUNCTION [ARGUMENT...]: again after a preemption or a kill, until FINISHED says that
# the run is complete. An error (status 1 or 2) is for people to mend; RESTARTS limits the rest
# (default 100).
until_finished() {
  local status attempt
  for ((attempt = 0; attempt <= ${RESTARTS:-100}; attempt++)); do
    status=0
    "$@" || status=$?
    if [[ -n "${DRY_RUN:-}" ]] || finished; then return 0; fi
    if [[ $status == 1 || $status == 2 ]]; then
      echo "error: the run failed with status $status; its message stands above" >&2
      return "$status"
    fi
    echo "stopped with status $status before its end: going on (restart $((attempt + 1)))" >&2
  done
  echo "error: still not finished after ${RESTARTS:-100} restarts" >&2
  return 1
}
