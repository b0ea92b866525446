#!/usr/bin/env bash
# Train on this machine, with torchrun; restarts after a crash, with the same exit policy as under SLURM.
#
#   launch/local.sh RUN_FOLDER --nproc 8 -- --config configs/model/yoco_3b.yaml configs/recipe/3b_1t.yaml ...
#
#   --nproc N          processes (GPUs); default 1
#   --max-restarts N   attempts in a row without a new trained step before giving up; default 3
# Everything after -- goes to pretrain_yoco.py. Ctrl-C saves and stops. PYTHON chooses the interpreter.
set -uo pipefail
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
[[ ${1-} == --help || ${1-} == -h ]] && usage && exit 0
[[ $# -lt 1 || $1 == -* ]] && usage >&2 && exit 2
run=$1
shift
nproc=1
max_restarts=3
while [[ $# -gt 0 ]]; do
    case $1 in
        --nproc | --max-restarts)
            [[ ${2-} =~ ^[0-9]+$ ]] || { echo "local.sh: error: $1 needs a number" >&2 && exit 2; } ;;&
        --nproc) nproc=$2 && shift 2 ;;
        --max-restarts) max_restarts=$2 && shift 2 ;;
        --help) usage && exit 0 ;;
        --) shift && break ;;
        *) echo "local.sh: error: unknown option $1; flags of pretrain_yoco.py come after --" >&2 && exit 2 ;;
    esac
done
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
command -v "$python" >/dev/null || { echo "local.sh: error: no Python at $python: make env, or set PYTHON" >&2 && exit 2; }
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck source=launch/lib/follow.sh
source "$here/launch/lib/follow.sh"
policy() { "$python" -m yoco_megatron.resilience.policy "$@"; }

rm -f "$run/triggers/exit" # of a Ctrl-C that came after the run had ended
while true; do
    verdict=$(policy begin "$run" --max-restarts "$max_restarts") || exit 2
    echo "local.sh: $verdict"
    case $verdict in
        go*) export YOCO_ATTEMPT=${verdict#go } ;;
        done*) exit 0 ;;
        *) exit 1 ;;
    esac
    mkdir -p "$run/triggers" "$run/logs"
    trap 'echo "local.sh: saving, then stopping"; touch "$run/triggers/exit"' INT TERM
    # Own process group, and a request by file: Ctrl-C must not reach torchrun, which would kill the processes.
    setsid "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" --log-dir "$run/logs" --tee 3 \
        "$here/pretrain_yoco.py" --run-folder "$run" "$@" &
    follow $!
    trap - INT TERM
    {
        read -r verdict
        read -r _
    } < <(policy end "$run" --exit-code "$rc")
    echo "local.sh: exit $rc: $verdict"
    case $verdict in
        done*) exit 0 ;;
        requeue*) ;;
        *) exit 1 ;;
    esac
done
