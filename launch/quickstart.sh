#!/usr/bin/env bash
#
# From nothing to a trained and evaluated model, in one command:
#
#     ./launch/quickstart.sh                          # minutes on a laptop's CPU, less on a GPU
#     ./launch/quickstart.sh max_steps=40             # arguments go to dist_deeplab.train
#     PYTHON=python3.12 ./launch/quickstart.sh        # with this interpreter; see launch/common.sh for more variables
#
# It sets up an environment (the active one, else .venv in the repository) and does what `dist-deeplab quickstart` does
# there, in the repository's folder:
#   1. draws a small data set in the format of PASCAL VOC         data/sample_voc/VOCdevkit/VOC2012
#   2. packs it into WebDataset shards                            data/sample_voc/shards
#   3. trains with torchrun, one process per GPU (CPU: two)       runs/quickstart, configs/quickstart.yaml
#   4. evaluates the best checkpoint: IoU of every class, figures
#
# Run it again at any time: finished steps are skipped, an interrupted training resumes from its last checkpoint.
# NPROC_PER_NODE sets the number of processes. To start over: rm -r runs/quickstart

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
for argument in "$@"; do
    case $argument in
        name=* | output_dir=* | --*)
            fail 2 "$argument cannot be changed here, where the evaluation expects runs/quickstart:" \
                "use launch/single_node.sh, which passes everything to the training."
            ;;
    esac
done
check_arguments "$@"
cd "$REPO"

setup_environment ""
processes=${NPROC_PER_NODE:-$(num_processes 2)}
exec python -m dist_deeplab quickstart --nproc-per-node "$processes" "$@"
