#!/usr/bin/env bash
#
# Train with each of several settings on all GPUs of this machine, one run after the other, and compare them:
#
#     ./launch/sweep.sh --config configs/quickstart.yaml name=poly optim.power=0.8,0.9,1.0
#     ./launch/sweep.sh --config FILE optim.power=0.8,0.9,1.0 optim.lr=1e-3,2e-3      # six runs
#     ./launch/sweep.sh --config FILE 'multi_scale.scales=[],[1.0,0.75,0.5]'          # commas in brackets do not separate
#
# The runs are runs/<name>-power_0.8 and so on; the table, a figure and a CSV file are in runs/<name>-sweep. In MLflow
# they are children of the run <name>-sweep; the last line printed opens the page that compares them.
# Run the same command again to resume: finished runs are skipped. NPROC_PER_NODE sets the number of processes of each
# training (default: one per GPU; without GPUs two). All arguments go to `dist-deeplab sweep`.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
check_arguments "$@"
[[ " $*" == *=*,* ]] || fail 2 "no grid: give a setting several values, as in optim.power=0.8,0.9."
setup_environment ""
processes=${NPROC_PER_NODE:-$(num_processes 2)}
check_count NPROC_PER_NODE "$processes"
set_num_threads "$processes"
exec python -m dist_deeplab.sweep --nproc-per-node "$processes" "$@"
