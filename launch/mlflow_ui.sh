#!/usr/bin/env bash
#
# Browse and compare the runs of ./runs in MLflow's pages: curves, settings, images.
#
#     ./launch/mlflow_ui.sh                           # then open one of the addresses that it prints
#     PORT=5001 ./launch/mlflow_ui.sh                 # where 5000 is taken
#     ssh -L 5000:127.0.0.1:5000 CLUSTER              # on your own machine, to look at a cluster's runs
#
# HOST (127.0.0.1) and PORT (5000) set the address. The server has no passwords: another HOST shows the runs to all who
# reach it, and needs --allowed-hosts too. All arguments go to `mlflow server`. Ctrl-C ends it.
# It reads the store of the current folder, runs/mlflow.db, where training in this folder writes.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -e runs/mlflow.db ]] ||
    fail 2 "there is no runs/mlflow.db in $PWD: train first (./launch/quickstart.sh), or start this where runs/ is."
use_environment
need_command mlflow

# Its background jobs are for language-model applications: several processes more, for nothing here.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}

echo "The runs, best mIoU first, once the server is up (\"Application startup complete\"):"
python -m dist_deeplab.tracking.mlflow.pages runs/mlflow.db "http://127.0.0.1:${PORT:-5000}" | sed 's/^/    /'

# The client has written the artifacts into runs/mlartifacts by itself and the store knows their paths, so the server
# only reads them there; --artifacts-destination is for runs logged through this server.
exec mlflow server --backend-store-uri sqlite:///runs/mlflow.db --artifacts-destination runs/mlartifacts \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers 1 "$@"
