#!/usr/bin/env bash
#
# Train in one process: one GPU, or the CPU where there is none.
#
#     ./launch/single_gpu.sh --config configs/quickstart.yaml
#     CUDA_VISIBLE_DEVICES=2 ./launch/single_gpu.sh --config configs/quickstart.yaml optim.lr=1e-3
#
# All arguments go to `dist-deeplab train` (--print-config lists the settings); relative paths count from the current
# folder, where runs/ is made too. Run the same command again to resume an interrupted run.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
check_arguments "$@"
setup_environment ""
exec python -m dist_deeplab.train "$@"
