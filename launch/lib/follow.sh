# Read by local.sh and slurm/train.sbatch.

follow() { # wait to the end of a child although traps interrupt it, and it may end while one runs; rc is how it ended
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1" # bash remembers
    rc=$?
}
