#!/usr/bin/env bash
#
# Train on all GPUs of this machine, one process each (on a machine without GPUs: two processes).
#
#     ./launch/single_node.sh --config configs/quickstart.yaml
#     NPROC_PER_NODE=4 ./launch/single_node.sh --config configs/quickstart.yaml data.num_workers=4
#
# All arguments go to `dist-deeplab train` (--print-config lists the settings); relative paths count from the current
# folder, where runs/ is made too.
# NPROC_PER_NODE sets the number of processes. torchrun's own options: PET_<OPTION>, for example PET_MAX_RESTARTS=3.
# Several of these can run side by side: --standalone picks a free port.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
check_arguments "$@"
setup_environment ""
processes=${NPROC_PER_NODE:-$(num_processes 2)}
check_count NPROC_PER_NODE "$processes"
set_num_threads "$processes"
exec python -m dist_deeplab torchrun --standalone --nproc_per_node "$processes" -m dist_deeplab.train "$@"
