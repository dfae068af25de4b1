#!/usr/bin/env bash
#
# Score a checkpoint under Slurm, on any number of nodes, from the repository's folder:
#
#     sbatch --gpus-per-node 8 --cpus-per-task 64 slurm/evaluate.sh runs/NAME/checkpoints/best.pt --data data/voc/val.json
#
# Everything after the script goes to dist_deeplab.evaluate as it is. sbatch's options, the environment, containers and
# the variables REPO, NPROC_PER_NODE, CONTAINER_EXEC and SRUN_OPTIONS are as in slurm/train.sh.
# The table is in dist_deeplab-evaluate-JOBID.out.

#SBATCH --job-name=dist_deeplab-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out

set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} && ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
fi
[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] || {
    echo "slurm/evaluate.sh: this is a batch script: submit it, as in 'sbatch slurm/evaluate.sh CHECKPOINT --data FILE'." >&2
    exit 2
}
repo=${REPO:-$SLURM_SUBMIT_DIR}
[[ -x $repo/launch/multi_node.sh && -e $repo/slurm/common.sh ]] || {
    echo "slurm/evaluate.sh: $repo does not hold launch/multi_node.sh and slurm/common.sh: call sbatch in the folder that" \
        "does, or set REPO to it." >&2
    exit 2
}
cd "$repo"
SCRIPT=slurm/evaluate.sh
export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-0} # a score that failed is best looked at; before common.sh's own default
# shellcheck source=slurm/common.sh
source slurm/common.sh
use_environment

set_rendezvous
run_on_nodes dist_deeplab.evaluate "$@"
wait_for_step
exit "$STEP_EXIT"
