#!/usr/bin/env bash
#
# Train under Slurm, on any number of nodes, from the repository's folder (on a disk that all nodes see):
#
#     sbatch --gpus-per-node 8 --cpus-per-task 64 slurm/train.sh --config configs/quickstart.yaml
#     sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 4:00:00 slurm/train.sh --config FILE optim.lr=1e-3
#
# sbatch's options come before the script: what your site asks for (partition, account, memory) goes there or into
# SBATCH_PARTITION, SBATCH_ACCOUNT ... Everything after the script goes to dist_deeplab.train as it is.
#
# One task per node: a torchrun that starts one process per GPU of the node (launch/multi_node.sh, which runs there) and
# starts them again after a crash. With `sbatch --ntasks-per-node 8` it is one task per process, without torchrun.
#
#     REPO=DIR          the repository, if it is not the folder where sbatch was called
#     MAX_REQUEUES=20   how often the job may put itself back into the queue; 0: never
#     NPROC_PER_NODE, CONTAINER_EXEC, SRUN_OPTIONS: see slurm/common.sh
#
# Two minutes before its time limit, when it is preempted, and when a process or node has failed, the run saves or has
# saved and the job goes back into the queue, under the same number, to resume from there, as long as it gets further
# each time (Slurm holds a requeued job for two minutes). scancel ends it for good; so do errors in arguments or data.
#
# Set the environment up once before, on a node with the same Python: pip install -e . -c constraints.txt, or any
# launcher. Used is the environment that was active at sbatch, else .venv in the repository.
# The output is in dist_deeplab-JOBID.out, each line with the number of its node.

#SBATCH --job-name=dist_deeplab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} && ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
fi
[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] || {
    echo "slurm/train.sh: this is a batch script: submit it, as in 'sbatch --nodes 2 slurm/train.sh --config FILE'." >&2
    exit 2
}
# Slurm runs a copy of this file from its own folder, so its path tells nothing about the repository's.
repo=${REPO:-$SLURM_SUBMIT_DIR}
[[ -x $repo/launch/multi_node.sh && -e $repo/slurm/common.sh ]] || {
    echo "slurm/train.sh: $repo does not hold launch/multi_node.sh and slurm/common.sh: call sbatch in the folder that" \
        "does, or set REPO to it." >&2
    exit 2
}
cd "$repo"
SCRIPT=slurm/train.sh
# shellcheck source=slurm/common.sh
source slurm/common.sh
use_environment

# --- requeueing -------------------------------------------------------------------------------------------------------

# "STATUS FIRST_STEP LAST_STEP", written by the run: running, stopped (saved, to be resumed), done or refused (would
# fail again). torchrun's exit code tells none of that.
export DIST_DEEPLAB_OUTCOME=$PWD/.dist_deeplab-$SLURM_JOB_ID.outcome
export DIST_DEEPLAB_REQUEUES=${MAX_REQUEUES:-20} # a run that stops says "requeued" as long as it will be
before=$DIST_DEEPLAB_OUTCOME.before # the first step of the attempt before this one
restarts=${SLURM_RESTART_COUNT:-0}

# Whether this attempt got further than the one before. A run that fails at the same place again is left alone.
has_progressed() {
    local status first last
    read -r status first last <"$DIST_DEEPLAB_OUTCOME" || return 1
    ((last > first)) || [[ $status == running && ! -e $before ]] || { [[ -e $before ]] && ((first > $(<"$before"))); }
}

# A job that was cancelled is no longer RUNNING; it must not come back.
is_running() { [[ $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) == *JobState=RUNNING* ]]; }

requeue() {
    local why=$1 first
    if ((restarts >= DIST_DEEPLAB_REQUEUES)); then
        echo "job $SLURM_JOB_ID: $why; not requeued: MAX_REQUEUES=$DIST_DEEPLAB_REQUEUES is reached. Submit it again."
    elif ! has_progressed; then
        echo "job $SLURM_JOB_ID: $why; not requeued: it got no further than the attempt before."
    elif ! is_running; then
        echo "job $SLURM_JOB_ID: $why; not requeued: it was cancelled, or Slurm is ending it."
    else
        read -r _ first _ <"$DIST_DEEPLAB_OUTCOME"
        printf '%s\n' "$first" >"$before"
        echo "job $SLURM_JOB_ID: $why; back into the queue (restart $((restarts + 1)))"
        scontrol requeue "$SLURM_JOB_ID" || fail 1 "scontrol requeue failed: submit the same command again to resume."
        exit 0 # Slurm ends this script
    fi
}

if ((restarts > DIST_DEEPLAB_REQUEUES)); then
    fail 1 "this is restart $restarts, MAX_REQUEUES is $DIST_DEEPLAB_REQUEUES: submit the same command again to resume."
fi
rm -f "$DIST_DEEPLAB_OUTCOME"

# --- the run ----------------------------------------------------------------------------------------------------------

set_rendezvous
echo "job $SLURM_JOB_ID: $NNODES nodes ($SLURM_JOB_NODELIST), rendezvous at $RDZV_ENDPOINT, in $repo; restart $restarts"
run_on_nodes dist_deeplab.train "$@"
wait_for_step

read -r status _ 2>/dev/null <"$DIST_DEEPLAB_OUTCOME" || status=
case $status in
    stopped) requeue "stopped and saved" ;;
    running) requeue "a process or node failed" ;;
esac
rm -f "$DIST_DEEPLAB_OUTCOME" "$before"
exit "$STEP_EXIT"
