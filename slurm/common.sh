# shellcheck shell=bash
#
# shellcheck disable=SC2034 # STEP and STEP_EXIT are for the scripts that source this
#
# What slurm/train.sh and slurm/evaluate.sh share; sourced inside a job, from the repository's folder.
#
#     set_rendezvous                      # NNODES, RDZV_ENDPOINT and RDZV_ID of this job, for launch/multi_node.sh
#     run_on_nodes MODULE ARGUMENTS...    # python -m MODULE on all processes of the job, in the background: STEP is srun
#
# Variables that users may set:
#     NPROC_PER_NODE=N  processes per node, if not one per GPU (on nodes without GPUs the default is 1)
#     CONTAINER_EXEC    a command that runs another one inside a container, with the repository and the data visible:
#                       CONTAINER_EXEC="apptainer exec --nv --bind /data image.sif"
#     PET_RDZV_CONF     torchrun's --rdzv_conf; join_timeout=300 unless set: how many seconds nodes wait for each other
#     SRUN_OPTIONS      more options for srun; for pyxis: SRUN_OPTIONS="--container-image=image.sqsh --container-mounts=..."

# shellcheck source=launch/common.sh
source launch/common.sh

set_rendezvous() {
    local first_node host port
    # The rendezvous is on the first node of the job. Not SLURM_LAUNCH_NODE_IPADDR: that may be the login node.
    read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        fail 1 "scontrol does not know $SLURM_JOB_NODELIST."
    host=$first_node
    if ! getent hosts "$host" >/dev/null; then
        # A name that the resolver does not know: the address at which Slurm itself reaches the node.
        host=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        [[ -n $host ]] || fail 1 "no address found for the first node, $first_node."
    fi
    # Below the ephemeral ports (32768 and up), so that no client's connection holds it; jobs that share a node differ.
    port=$((20000 + SLURM_JOB_ID % 10000))
    export NNODES=$SLURM_JOB_NUM_NODES
    export RDZV_ENDPOINT=$host:$port
    # A requeued job keeps its id: with the count, nodes never join what is left of an earlier attempt.
    export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    # A lost node is not replaced, so the others must not wait torchrun's ten minutes for it.
    export PET_RDZV_CONF=${PET_RDZV_CONF:-join_timeout=300}
}

run_on_nodes() {
    local module=$1 tasks_per_node=1
    local command=("$PWD/launch/multi_node.sh") container=() options=()
    shift
    read -r -a container <<<"${CONTAINER_EXEC:-}"
    read -r -a options <<<"${SRUN_OPTIONS:-}"
    # Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    if [[ ${SLURM_NTASKS_PER_NODE:-1} =~ ^[0-9]+$ ]] && ((${SLURM_NTASKS_PER_NODE:-1} > 1)); then
        # One task per process, as `sbatch --ntasks-per-node 8` asks for: no torchrun, and so no restarts inside the job.
        tasks_per_node=$SLURM_NTASKS_PER_NODE
        export MASTER_ADDR=${RDZV_ENDPOINT%:*} MASTER_PORT=${RDZV_ENDPOINT##*:}
        command=(python -m "$module")
    else
        export MODULE=$module
    fi
    # One node's failure ends the others: at once after a bad exit, after a minute where a node no longer answers.
    srun --nodes "$NNODES" --ntasks "$((NNODES * tasks_per_node))" --ntasks-per-node "$tasks_per_node" \
        --kill-on-bad-exit=1 --wait=60 --label ${options[@]+"${options[@]}"} \
        ${container[@]+"${container[@]}"} "${command[@]}" "$@" &
    STEP=$!
}

# Wait for the step, however many signals arrive meanwhile, and put its exit code into STEP_EXIT.
wait_for_step() {
    STEP_EXIT=0
    # Slurm's --signal=B:USR1@... and scancel --batch reach only this shell: srun passes the signal on.
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    while :; do
        if wait "$STEP"; then STEP_EXIT=0; else STEP_EXIT=$?; fi
        kill -0 "$STEP" 2>/dev/null || break
    done
    trap - USR1 TERM
}

pass_on() {
    say "SIG$1: asking the step to stop"
    kill -"$1" "$STEP" 2>/dev/null || true
}
