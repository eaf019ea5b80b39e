#!/usr/bin/env bash
# A TPU slice on GKE as a JobSet, which restarts and resumes by itself after a preemption.
#
#   NAME=mine IMAGE=REGISTRY/r1s_jax:1 ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x8 HOSTS=8 CHIPS=4 \
#   CLAIM=shared-disk RECIPE=qwen2_5_7b_stage2 RUN_DIR=/shared/runs/mine \
#     configs/launch/gke_jobset.sh [section.field=value ...]
#
# HOSTS x CHIPS are the chips of TOPOLOGY; CLAIM is a ReadWriteMany volume claim mounted at /shared;
# IMAGE holds r1s_jax with its extra `tpu`. DRY_RUN=1 only prints the manifest.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"

need NAME "a name for the job, in lower case"
need IMAGE "a container image with r1s-jax[tpu]"
need ACCELERATOR "the node label, e.g. tpu-v6e-slice, tpu-v5p-slice"
need TOPOLOGY "its topology, e.g. 4x8"
need HOSTS "the number of virtual machines of the slice"
need CHIPS "the number of chips of each virtual machine"
need CLAIM "a ReadWriteMany volume claim, mounted at /shared"
need RECIPE "a recipe; r1s configs lists them"
need RUN_DIR "a directory under /shared"
need_command kubectl
if [[ $RUN_DIR != /shared/* ]]; then
  echo "error: RUN_DIR=$RUN_DIR must lie under /shared, which every host sees" >&2
  exit 2
fi

train=$(printf '%q ' r1s train "$RECIPE" "$@" --run-dir "$RUN_DIR" --resume --distributed)
# A run stopped by a signal exits with 0 before it is complete: then the JobSet must restart it.
complete=$(printf 'test -e %q' "$RUN_DIR/summary.json")

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              # Seconds that a preempted host has to save.
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: r1s
                  image: $IMAGE
                  command:
                    - bash
                    - -c
                    - |
                      $train&& $complete
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - {name: shared, mountPath: /shared}
              volumes:
                - name: shared
                  persistentVolumeClaim: {claimName: $CLAIM}
YAML
}

if [[ -n "${DRY_RUN:-}" ]]; then
  manifest
else
  manifest | run kubectl apply -f -
fi
