#!/usr/bin/env bash
#
# From nothing to a trained and evaluated model, in one command:
#
#     ./launch/quickstart.sh                          # minutes on a laptop's CPU, less on a GPU
#     ./launch/quickstart.sh max_steps=40             # arguments go to dist_deeplab.train
#     PYTHON=python3.12 ./launch/quickstart.sh        # with this interpreter; see launch/common.sh for more variables
#
# It
#   1. sets up an environment: the active one, else .venv in the repository
#   2. draws a small data set in the format of PASCAL VOC         data/sample_voc/VOCdevkit/VOC2012
#   3. packs it into WebDataset shards                            data/sample_voc/shards
#   4. trains with torchrun, one process per GPU (CPU: two)       runs/quickstart, configs/quickstart.yaml
#   5. evaluates the best checkpoint: IoU of every class, figures
#
# Run it again at any time: finished steps are skipped, an interrupted training goes on from its last checkpoint.
# To start over: rm -r runs/quickstart

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

for argument in "$@"; do
    case $argument in
        -h | --help)
            print_manual
            exit 0
            ;;
        name=* | output_dir=* | --config | --config=* | --print-config | --dry-run)
            fail 2 "$argument cannot be changed here, where the evaluation expects runs/quickstart:" \
                "use launch/single_node.sh, which passes everything to the training."
            ;;
    esac
done

setup_environment ""

voc=data/sample_voc/VOCdevkit/VOC2012
shards=data/sample_voc/shards

python -m dist_deeplab sample-voc --out data/sample_voc
missing=()
for split in train val; do
    # The manifest is written last: where it exists, the shards are complete.
    if [[ ! -e $shards/$split.json ]]; then
        missing+=("$split")
    fi
done
if ((${#missing[@]})); then
    python -m dist_deeplab shards --voc-root "$voc" --split "${missing[@]}" --out "$shards"
fi

processes=${NPROC_PER_NODE:-$(num_processes 2)}
check_count NPROC_PER_NODE "$processes"
set_num_threads "$processes"

say "training on $processes processes: runs/quickstart"
torchrun --standalone --nproc_per_node "$processes" -m dist_deeplab.train --config configs/quickstart.yaml "$@"

say "evaluating the best checkpoint"
torchrun --standalone --nproc_per_node "$processes" -m dist_deeplab.evaluate \
    runs/quickstart/checkpoints/best.pt --data "$shards/val.json"

cat <<END

Done.
  the run's files       runs/quickstart/              config, metrics.jsonl, checkpoints, logs
  the pictures          runs/quickstart/eval/         predictions, confusion matrix, IoU per class
  all runs compared     ./launch/mlflow_ui.sh         then open http://127.0.0.1:5000
END
