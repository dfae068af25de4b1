#!/usr/bin/env bash
#
# Train with each of several settings under Slurm, as an array job with one task for each run, then compare them. From
# the repository's folder, not through sbatch: it submits itself.
#
#     ./slurm/sweep.sh --gpus-per-node 8 --cpus-per-task 64 -- --config FILE name=poly optim.power=0.8,0.9,1.0
#     ./slurm/sweep.sh --nodes 2 --gpus-per-node 8 --array-limit 2 -- --config FILE optim.lr=1e-3,2e-3 optim.power=0.9,1
#
# Before the -- are options of sbatch, as for slurm/train.sh; --array-limit N lets N runs train at a time. After it are
# the settings and the grid, see launch/sweep.sh. Each run is one job of slurm/train.sh. A last job, which starts when
# all have ended, compares what there is, with the account, partition and QOS of the others; its output is in
# dist_deeplab-report-JOBID.out, its figure in runs/<name>-sweep. Submit the same again to resume: finished runs end at
# once.
#
#     REPO=DIR          the repository, if it is not the current folder

#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

set -euo pipefail

# The repository: Slurm runs a copy of this file from its own folder, so its path tells nothing.
repo=${REPO:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -x $repo/slurm/train.sh && -e $repo/launch/common.sh ]] || {
    echo "slurm/sweep.sh: $repo does not hold slurm/train.sh and launch/common.sh: call this in the folder that does, or" \
        "set REPO to it." >&2
    exit 2
}
cd "$repo"
SCRIPT=slurm/sweep.sh
# shellcheck source=launch/common.sh
source launch/common.sh
answer_help "$@"
use_environment

# --- inside the jobs --------------------------------------------------------------------------------------------------

if [[ ${DIST_DEEPLAB_SWEEP:-} == report ]]; then
    exec python -m dist_deeplab.sweep --report "$@"
fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    arguments=()
    while IFS= read -r -d '' argument; do
        arguments+=("$argument")
    done < <(python -m dist_deeplab.sweep --child "$SLURM_ARRAY_TASK_ID" "$@")
    ((${#arguments[@]})) || fail 2 "run $SLURM_ARRAY_TASK_ID of the grid could not be planned, see above."
    exec slurm/train.sh "${arguments[@]}"
fi

# --- submission -------------------------------------------------------------------------------------------------------

options=()
shared=() # what a site may ask of each job, however small: the comparison gets it too
limit=
while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --array-limit ]]; then
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail 2 "--array-limit takes a positive whole number."
        limit=%$2
        shift
    else
        options+=("$1")
        case $1 in
            -A | --account | -p | --partition | -q | --qos) shared+=("$1" "${2:-}") ;;
            -A* | --account=* | -p* | --partition=* | -q* | --qos=*) shared+=("$1") ;;
        esac
    fi
    shift
done
[[ ${1:-} == -- ]] || fail 2 "write -- between the options of sbatch and the settings, as in the manual at the top."
shift

# What is wrong with the grid is said here, before anything is submitted.
count=$(python -m dist_deeplab.sweep --count "$@") || exit $?
job=$(sbatch --parsable --job-name=dist_deeplab --array="0-$((count - 1))$limit" --output=%x-%A_%a.out \
    "${options[@]}" slurm/sweep.sh "$@")
report=$(sbatch --parsable --export=ALL,DIST_DEEPLAB_SWEEP=report --job-name=dist_deeplab-report --output=%x-%j.out \
    --dependency="afterany:$job" --nodes=1 --ntasks=1 ${shared[@]+"${shared[@]}"} slurm/sweep.sh "$@") ||
    fail 1 "$count runs are job $job, but their comparison could not be submitted; when they have ended: python -m" \
        "dist_deeplab.sweep --report and the same settings."
printf '%s runs: job %s; their comparison: job %s\n' "$count" "$job" "$report"
