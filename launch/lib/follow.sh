# Read by local.sh and slurm/train.sbatch.

follow() { # wait for a child to end, also if traps interrupt the wait or the child ends during one; rc: its exit status
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1" # bash remembers the status
    rc=$?
}
