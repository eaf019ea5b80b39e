#!/usr/bin/env bash
#SBATCH --job-name=r1s
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Slurm, one task per GPU. Two minutes before the time limit, and when it is preempted, the run saves
# and the job returns to the queue, until the run is complete.
#
#   RECIPE=qwen2_5_3b RUN_DIR=/shared/runs/mine sbatch configs/launch/slurm.sh [field=value ...]
#
# Every node must see RUN_DIR. DRY_RUN=1 (with bash instead of sbatch) only prints the commands.
# Slurm runs a copy of this file: set R1S_REPOSITORY unless sbatch is called in the repository.
source "${R1S_REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/configs/launch/_lib.sh"

need RECIPE "a recipe; r1s configs lists them"
need RUN_DIR "a directory that every node sees"
need_command srun

finished() { [[ -e "$RUN_DIR/summary.json" ]]; }

status=0
run srun --kill-on-bad-exit=1 \
  r1s train "$RECIPE" "$@" --run-dir "$RUN_DIR" --resume --distributed || status=$?
if [[ -z "${DRY_RUN:-}" ]] && ! finished && [[ $status != 1 && $status != 2 ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
