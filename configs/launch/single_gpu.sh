#!/usr/bin/env bash
# One machine, with a GPU or any other device of JAX. Resumes after a kill until the run is complete.
#
#   RECIPE=tiny_world RUN_DIR=runs/mine configs/launch/single_gpu.sh [section.field=value ...]
#
# DRY_RUN=1 only prints the commands.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"

need RECIPE "a recipe; r1s configs lists them"
need RUN_DIR "a directory for the run"
need_command r1s

finished() { [[ -e "$RUN_DIR/summary.json" ]]; }

until_finished run r1s train "$RECIPE" "$@" --run-dir "$RUN_DIR" --resume
