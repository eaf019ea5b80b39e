#!/usr/bin/env bash
# One machine: a GPU, or whatever JAX finds. Goes on after a kill until the run is complete.
#
#   RECIPE=tiny_world RUN_DIR=runs/mine configs/launch/single_gpu.sh [section.field=value ...]
#
# DRY_RUN=1 only prints what would be done.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"

need RECIPE "a recipe; r1s configs lists them"
need RUN_DIR "a directory for the run"
need_command r1s

finished() { [[ -e "$RUN_DIR/summary.json" ]]; }

until_finished run r1s train "$RECIPE" "$@" --run-dir "$RUN_DIR" --resume
