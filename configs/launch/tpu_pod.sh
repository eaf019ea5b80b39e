#!/usr/bin/env bash
# A TPU slice by queued resources: requests it, installs, trains on all its hosts, and requests it
# again after a preemption, until the run is complete.
#
#   NAME=mine PROJECT=my-project ZONE=us-east5-a ACCELERATOR=v5p-32 RUNTIME=v2-alpha-tpuv5 \
#   SOURCE=git+https://HOST/r1s_jax.git RECIPE=qwen2_5_7b_stage2 RUN_DIR=/mnt/shared/runs/mine \
#     configs/launch/tpu_pod.sh [section.field=value ...]
#
# SETUP is a command that runs first on every host; it must mount a shared file system for RUN_DIR
# (Filestore, gcsfuse). SPOT=1 requests spot capacity. DRY_RUN=1 only prints the commands.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"

need NAME "a name for the slice"
need PROJECT "the Google Cloud project"
need ZONE "the zone, e.g. us-east5-a"
need ACCELERATOR "its type, e.g. v5p-32 (16 chips), v6e-32, v5litepod-64"
need RUNTIME "its software, e.g. v2-alpha-tpuv5, v2-alpha-tpuv6e, v2-alpha-tpuv5-lite"
need SOURCE "the source of r1s_jax for pip: git+https://..., or a wheel"
need RECIPE "a recipe; r1s configs lists them"
need RUN_DIR "a directory that every host sees"
need_command gcloud

where=(--project "$PROJECT" --zone "$ZONE")

on_hosts() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

state() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    echo ABSENT
    return
  fi
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo ABSENT
}

finished() { on_hosts 0 "test -e $(printf %q "$RUN_DIR")/summary.json"; }

acquire() {
  local now
  now=$(state)
  if [[ $now == SUSPENDED || $now == SUSPENDING || $now == FAILED ]]; then
    run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    now=ABSENT
  fi
  if [[ $now == ABSENT ]]; then
    run gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
      --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  fi
  while [[ -z "${DRY_RUN:-}" && $(state) != ACTIVE ]]; do
    echo "waiting for $NAME: $(state)" >&2
    sleep 30
  done
  on_hosts all "${SETUP:-true}"
  on_hosts all "python3 -m pip install --quiet $(printf %q "r1s-jax[tpu] @ $SOURCE")"
}

attempt() {
  local command status=0
  (set -e && acquire) || return
  command=$(printf '%q ' python3 -m r1s_jax.cli train "$RECIPE" "$@" \
    --run-dir "$RUN_DIR" --resume --distributed)
  on_hosts all "$command" || status=$?
  # A lost slice also breaks the connection: this is no error of the run.
  if [[ $status != 0 && $(state) != ACTIVE ]]; then status=75; fi
  return "$status"
}

until_finished attempt "$@"
