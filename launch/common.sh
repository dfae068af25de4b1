# shellcheck shell=bash
#
# What the launchers share: finding a Python, setting up its environment, counting processes. Sourced, never run:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
#     setup_environment ""          # or "test", "dev", "crf", "test,crf": the extras of setup.py
#     use_environment               # the same choice of environment, but nothing is installed
#
# Variables that users may set:
#     VIRTUAL_ENV, CONDA_PREFIX     an active environment; it is used as it is, and what is missing is installed into it
#     PYTHON=python3.12             else the interpreter that makes .venv in the repository
#                                   (default: the first of python3.13 ... python3.10, python3 that runs and is >= 3.10)
#     TORCH_INDEX_URL=URL           where to get torch from when it has to be installed (a CPU or another CUDA build)
#     OMP_NUM_THREADS=N             CPU threads per process (default: cores / processes)
#
# A torch >= 2.10 that is already installed is kept, whatever constraints.txt pins.
# Exit codes: 1 error, 2 wrong setting.

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# Without this torchrun's restarts read stale keys from the agent's store and hang (torch 2.13, pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun dies of SIGUSR1, Slurm's warning, unless told to pass it on; and gives workers time to save.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-90}
# After a crash of a process it starts all of them again, from the last checkpoint.
export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-3}

# --- messages ---------------------------------------------------------------------------------------------------------

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# fail EXIT_CODE SENTENCE: end the script with one sentence.
fail() {
    say "${*:2}"
    exit "$1"
}

# Print the comment at the top of the calling script: it is the manual.
print_manual() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# --- the environment --------------------------------------------------------------------------------------------------

# "3.11" for an interpreter that runs, nothing for one that does not (as a version manager's shim of a missing one).
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_supported() { [[ $1 =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 10)); }

# The interpreter to make .venv with: PYTHON, or the first suitable one on PATH.
find_python() {
    local candidate version
    if [[ -n ${PYTHON:-} ]]; then
        version=$(python_version "$PYTHON")
        [[ -n $version ]] || fail 2 "PYTHON=$PYTHON does not run: give the name or path of a Python >= 3.10."
        is_supported "$version" ||
            fail 2 "PYTHON=$PYTHON is Python $version: give the name or path of a Python >= 3.10."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3.10 python3; do
        if is_supported "$(python_version "$candidate")"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail 1 "no Python >= 3.10 found on PATH: install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
        "or set PYTHON to its path."
}

# Sound: finished, its interpreter runs and is not the system's, and its pip belongs to this folder (not so once moved).
is_sound() {
    local python=$1/bin/python
    [[ ! -e $1/.dist_deeplab_unfinished ]] && is_supported "$(python_version "$python")" || return 1
    "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' || return 1
    [[ -x $1/bin/pip ]] || "$python" -m ensurepip --default-pip >/dev/null 2>&1 || return 1
    [[ $("$1/bin/pip" --version 2>/dev/null) == *" from $1/"* ]]
}

# Make .venv, or make it again where an earlier attempt was cut short.
make_venv() {
    local venv=$1 python
    if [[ -e $venv ]] && is_sound "$venv"; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail 1 "$python cannot make virtual environments: install the module" \
            "(Debian, Ubuntu: apt-get install python3-venv, or python$(python_version "$python")-venv)."
    if [[ -e $venv ]]; then
        say "$venv is unfinished, was moved or has no pip: making it again"
    else
        say "making $venv with $python"
    fi
    # Without pip this is a matter of milliseconds; the marker then stays until pip has installed everything.
    "$python" -m venv --clear --without-pip "$venv"
    touch "$venv/.dist_deeplab_unfinished"
    "$venv/bin/python" -m ensurepip --default-pip >/dev/null
}

# The folder of the environment to use, in ENVIRONMENT: the active one, else .venv (which may not exist yet).
choose_environment() {
    local version python
    ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [[ -z $ENVIRONMENT ]]; then
        ENVIRONMENT=$REPO/.venv
        version=$(python_version "$ENVIRONMENT/bin/python")
        if [[ -n ${PYTHON:-} ]]; then
            python=$(find_python)
            [[ -z $version || $(python_version "$python") == "$version" ]] ||
                fail 2 "$ENVIRONMENT was made with Python $version, not with PYTHON=$PYTHON: remove it or unset PYTHON."
        fi
        return
    fi
    version=$(python_version "$ENVIRONMENT/bin/python")
    [[ -n $version ]] ||
        fail 2 "the active environment $ENVIRONMENT has no working bin/python: activate another or none."
    is_supported "$version" ||
        fail 2 "the active environment $ENVIRONMENT has Python $version, not 3.10 or newer: activate another or none."
    if [[ -n ${PYTHON:-} ]]; then
        say "PYTHON=$PYTHON is not used: the environment $ENVIRONMENT is active"
    fi
}

# From here on `python`, `torchrun` and `mlflow` are those of ENVIRONMENT.
activate_environment() {
    export PATH=$ENVIRONMENT/bin:$PATH
    if [[ $ENVIRONMENT != "${CONDA_PREFIX:-}" ]]; then
        export VIRTUAL_ENV=$ENVIRONMENT
    fi
    unset PYTHONHOME
}

# Use the active environment or .venv without installing anything (several nodes may start at once); else PATH as it is.
use_environment() {
    choose_environment
    if [[ -x $ENVIRONMENT/bin/python ]]; then
        activate_environment
    fi
}

# need_command NAME: an error that names the remedy, instead of bash's "command not found".
need_command() {
    command -v "$1" >/dev/null ||
        fail 1 "$1 is not installed in this environment: pip install -e . -c constraints.txt, or launch/quickstart.sh."
}

# --- installation -----------------------------------------------------------------------------------------------------

# What an installation depends on. The path is in it, because an editable installation points to the repository.
fingerprint() {
    { cat "$REPO/setup.py" "$REPO/constraints.txt" && printf '%s\n' "$1" "$ENVIRONMENT" "$REPO"; } | cksum
}

# Up to date: same fingerprint, and nobody has uninstalled the two things that matter. Takes some 0.1 s.
is_installed() {
    local stamp=$ENVIRONMENT/.dist_deeplab_installed_$1
    [[ ! -e $ENVIRONMENT/.dist_deeplab_unfinished && -e $stamp && $(<"$stamp") == "$(fingerprint "$1")" ]] &&
        "$ENVIRONMENT/bin/python" -c 'from importlib.metadata import version as v; v("torch"), v("dist_deeplab")' \
            2>/dev/null
}

# The version of the installed torch if it can be imported and is new enough, else nothing.
suitable_torch() {
    "$ENVIRONMENT/bin/python" - 2>/dev/null <<'PY' || true
from importlib.metadata import version

import torch
from pip._vendor.packaging.version import Version

assert torch.__version__ and Version(version("torch")) >= Version("2.10")
print(version("torch"))
PY
}

has_gpu() { [[ -e /dev/nvidia0 ]] || command -v nvidia-smi >/dev/null; }

install_torch() {
    local pin
    pin=$(sed -n 's/^\(torch==[^; ]*\).*/\1/p' "$REPO/constraints.txt")
    if [[ -z ${TORCH_INDEX_URL:-} && $(uname -sm) == "Linux x86_64" ]] && ! has_gpu; then
        say "note: there is no NVIDIA GPU here; the default torch for Linux may bring several GB of CUDA packages." \
            "For the small CPU build stop now (Ctrl-C) and run this again with TORCH_INDEX_URL set to the CPU index" \
            "that the install selector on PyTorch's web site shows."
    fi
    say "installing $pin"
    pip_install "$pin" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
}

pip_install() {
    if ! "$ENVIRONMENT/bin/python" -m pip install --disable-pip-version-check "$@"; then
        # pip itself gave up, it was not killed: what it has installed so far is whole.
        rm -f "$ENVIRONMENT/.dist_deeplab_unfinished"
        fail 1 "pip could not install into $ENVIRONMENT: see its message above."
    fi
}

# Install the package, editable, with its extras; keep a suitable torch.
install_package() {
    local extras=$1 torch constraints
    torch=$(suitable_torch)
    if [[ -z $torch ]]; then
        install_torch
        torch=$(suitable_torch)
        [[ -n $torch ]] || fail 1 "torch is installed in $ENVIRONMENT but cannot be imported: try 'import torch' there."
    else
        say "keeping torch $torch"
    fi
    # The kept torch stands in for the pinned one: otherwise pip would replace a cluster's own build.
    constraints=$(mktemp)
    { grep -v '^torch==' "$REPO/constraints.txt" && printf 'torch==%s\n' "$torch"; } >"$constraints"
    say "installing dist_deeplab${extras:+[$extras]} and what it needs"
    (pip_install --editable "$REPO${extras:+[$extras]}" --constraint "$constraints") ||
        { rm -f "$constraints" && exit 1; }
    rm -f "$constraints"
}

# setup_environment EXTRAS: an environment with the package in it, active. Quick when nothing has changed.
setup_environment() {
    choose_environment
    if ! is_installed "$1"; then
        # One at a time: two launchers started together would each find the other's half-made .venv.
        (
            if command -v flock >/dev/null; then
                flock --nonblock 9 || { say "waiting for another installation here to finish" && flock 9; }
            fi
            if is_installed "$1"; then exit 0; fi
            if [[ $ENVIRONMENT == "$REPO/.venv" ]]; then
                make_venv "$ENVIRONMENT"
            fi
            "$ENVIRONMENT/bin/python" -m pip --version >/dev/null 2>&1 ||
                "$ENVIRONMENT/bin/python" -m ensurepip --default-pip ||
                fail 1 "the environment $ENVIRONMENT has no pip: install it there."
            install_package "$1"
            rm -f "$ENVIRONMENT/.dist_deeplab_unfinished"
            fingerprint "$1" >"$ENVIRONMENT/.dist_deeplab_installed_$1"
            say "ready: $ENVIRONMENT"
        ) 9>"$REPO/.setup.lock"
    fi
    activate_environment
}

# --- processes --------------------------------------------------------------------------------------------------------

# num_processes WITHOUT_GPU: processes to start on this machine: one per GPU, WITHOUT_GPU where there is none.
num_processes() {
    if has_accelerator; then
        python -c 'import sys, torch; print(torch.cuda.device_count() or sys.argv[1])' "$1"
    else
        printf '%s\n' "$1" # torch takes two seconds to say the same
    fi
}

# Whether there may be a GPU that torch can use: the driver of NVIDIA, Jetson, WSL or AMD.
has_accelerator() { has_gpu || [[ -e /dev/nvidiactl || -e /dev/nvhost-gpu || -e /dev/dxg || -e /dev/kfd ]]; }

# check_count NAME VALUE: refuse what is no positive whole number.
check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "$1=$2 is not a positive whole number."
}

# set_num_threads NUM_PROCESSES: share the cores that this process may use among the processes of this machine.
set_num_threads() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}
