#!/usr/bin/env bash
#
# Train on several machines, without a scheduler: run the same command on each of them, within ten minutes.
#
#     NNODES=2 RDZV_ENDPOINT=node1:29400 RDZV_ID=voc1 ./launch/multi_node.sh --config configs/quickstart.yaml
#
#     NNODES            number of machines, or MIN:MAX (see below)
#     RDZV_ENDPOINT     HOST:PORT the rendezvous: any one of them, by a name that all of them resolve, and a free port
#     RDZV_ID           the same word on all of them, another one for each run at the same endpoint
#     NPROC_PER_NODE    processes on this machine (default: one per GPU; without a GPU: 1)
#
# Ranks are agreed upon at the rendezvous; the machines need no numbers. torchrun's own options: PET_<OPTION>, for
# example PET_LOCAL_ADDR=10.0.0.7 on a machine whose host name the others cannot resolve, or PET_MAX_RESTARTS=10 (the
# default is 3: how often a crash makes it start again from the last checkpoint).
#
# NNODES=2:4 trains on whatever machines are there: it begins with two or more, continues with those that are left
# when one is lost, and accepts one that joins (again) by this same command. A step has the same images at any number:
# set batch.micro_size to what a GPU can hold (or to auto), and fewer GPUs accumulate more of them. Any number of
# processes will do, up to batch.global_size; where it does not divide that, some wait for others in each step. The
# machine of RDZV_ENDPOINT must stay.
#
# Nothing is installed here, since machines that share a disk would do it all at once. Once, on one of them (on each,
# if they share none): pip install -e . -c constraints.txt, or any other launcher. The environment is the active one,
# else .venv in the repository. All arguments go to dist_deeplab.train (MODULE=dist_deeplab.doctor or
# dist_deeplab.evaluate: to these); relative paths count from the current folder.
# Under Slurm use slurm/train.sh, which calls this on each node.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"

[[ -n ${NNODES:-} ]] || fail 2 "NNODES is not set: the number of machines, for example NNODES=2 or NNODES=2:4."
[[ -n ${RDZV_ENDPOINT:-} ]] ||
    fail 2 "RDZV_ENDPOINT is not set: the rendezvous of the machines, for example RDZV_ENDPOINT=node1:29400."
[[ -n ${RDZV_ID:-} ]] ||
    fail 2 "RDZV_ID is not set: any word, the same on all machines, for example RDZV_ID=voc1."
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
    fail 2 "NNODES=$NNODES is not a positive whole number, and not MIN:MAX of two."
((${NNODES%%:*} <= ${NNODES##*:})) || fail 2 "NNODES=$NNODES is not MIN:MAX: the smaller number comes first."
if ! [[ $RDZV_ENDPOINT =~ ^.+:([1-9][0-9]{0,4})$ ]] || ((BASH_REMATCH[1] > 65535)); then
    fail 2 "RDZV_ENDPOINT=$RDZV_ENDPOINT is not HOST:PORT: for example RDZV_ENDPOINT=node1:29400."
fi

use_environment
need_package
processes=${NPROC_PER_NODE:-$(num_processes 0)}
if [[ $processes == 0 && -z ${NPROC_PER_NODE:-} ]]; then
    # A driver or torch build that does not fit would otherwise train on the CPU of a GPU node, unnoticed.
    ((${SLURM_GPUS_ON_NODE:-0} == 0)) ||
        fail 1 "Slurm gave $SLURM_GPUS_ON_NODE GPUs on $(uname -n), but torch sees none: check build and driver."
    processes=1
fi
check_count NPROC_PER_NODE "$processes"
set_num_threads "$processes"
exec python -m dist_deeplab torchrun --nnodes "$NNODES" --nproc_per_node "$processes" \
    --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "$RDZV_ID" \
    -m "${MODULE:-dist_deeplab.train}" "$@"
