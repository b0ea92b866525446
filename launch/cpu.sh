#!/usr/bin/env bash
# Train on this machine's CPU, over gloo: launch/local.sh with one thread a process and the GPUs hidden.
#
#   launch/cpu.sh RUN_FOLDER --nproc 2 -- --config configs/model/yoco_tiny.yaml configs/recipe/demo.yaml ...
set -euo pipefail
if [[ ${1-} == --help || ${1-} == -h ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0"
fi
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$(dirname "$0")/local.sh" "$@"
