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
# One task per node: a torchrun that starts one process per GPU of the node (launch/multi_node.sh, which runs there).
#
#     NPROC_PER_NODE=N  processes per node, if not one per GPU (on nodes without GPUs the default is 1)
#     REPO=DIR          the repository, if it is not the folder where sbatch was called
#
# Set the environment up once before, on a node with the same Python: pip install -e . -c constraints.txt, or any
# launcher. Used is the environment that was active at sbatch, else .venv in the repository.
# The output is in dist_deeplab-JOBID.out, each line with the number of its node.
#
# Do not add --signal=USR1@...: torchrun ends at once on that signal, and training with it.

#SBATCH --job-name=dist_deeplab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out

set -euo pipefail

fail() {
    printf 'slurm/train.sh: %s\n' "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
    fail "this is a batch script: submit it, as in 'sbatch --nodes 2 slurm/train.sh --config FILE'."

# Slurm runs a copy of this file from its own folder, so its path tells nothing about the repository's.
repo=${REPO:-$SLURM_SUBMIT_DIR}
[[ -x $repo/launch/multi_node.sh && -d $repo/dist_deeplab ]] ||
    fail "$repo is not the repository (no launch/multi_node.sh, dist_deeplab/): call sbatch there or set REPO."
cd "$repo"

# The nodes meet at the first one of the job. Not SLURM_LAUNCH_NODE_IPADDR: that may be the login node.
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
    fail "scontrol does not know $SLURM_JOB_NODELIST."
host=$first_node
if ! getent hosts "$host" >/dev/null; then
    # A name that the resolver does not know: the address at which Slurm itself reaches the node.
    host=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    [[ -n $host ]] || fail "no address found for the first node, $first_node."
fi
# Below the ephemeral ports (32768 and up), so that no client's connection holds it; jobs sharing a node differ in it.
port=$((20000 + SLURM_JOB_ID % 10000))

export NNODES=$SLURM_JOB_NUM_NODES
export RDZV_ENDPOINT=$host:$port
# A requeued job keeps its id: with the count, nodes never meet at what is left of an earlier attempt.
export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

echo "job $SLURM_JOB_ID: $NNODES nodes ($SLURM_JOB_NODELIST) meet at $RDZV_ENDPOINT, in $repo"

# One node's failure ends the others: at once after a bad exit, after a minute where a node has just gone quiet.
exec srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --wait=60 --label \
    "$repo/launch/multi_node.sh" "$@"
