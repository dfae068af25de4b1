# shellcheck shell=bash
#
# What the launchers share: finding a Python, setting up its environment, counting processes. Sourced, never run:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
#     setup_environment ""          # or "test", "dev", "crf", "test,crf": the extras of setup.py
#     use_environment               # the same choice of environment, but nothing is installed
#
# Variables that users may set:
#     VIRTUAL_ENV, CONDA_PREFIX     an active environment; if it has the package, nothing is installed, else what is missing
#     PYTHON=python3.12             without one: the interpreter that makes .venv in the repository
#                                   (default: the first of python3.13 ... 3.11, 3.14 and python3 that runs and is >= 3.11)
#     TORCH_INDEX_URL=URL           where to get torch from when it has to be installed (a CPU or another CUDA build)
#     OMP_NUM_THREADS=N             CPU threads per process (default: cores / processes)
#
# Without an active environment, a Python on PATH that has the package (as in a container) is used before .venv.
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

# Each rank holds a socket per rank and open shards; the usual soft limit of 1,024 files does not last for 1,000 ranks.
ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true

# --- messages ---------------------------------------------------------------------------------------------------------

# Slurm runs a copy of a batch script under another name; SCRIPT holds its own.
say() { printf '%s: %s\n' "${SCRIPT:-${0##*/}}" "$*" >&2; }

# fail EXIT_CODE SENTENCE: end the script with one sentence.
fail() {
    say "${*:2}"
    exit "$1"
}

# Print the comment at the top of the calling script: it is the manual.
print_manual() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# answer_help "$@": print the manual and end where help is asked for, before anything is installed.
answer_help() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        print_manual
        exit 0
    fi
}

# check_arguments "$@": refuse what training could not read, before an installation that takes minutes.
check_arguments() {
    while (($#)); do
        case $1 in
            --config | --nproc-per-node | --child) shift ;;
            --config=* | --nproc-per-node=* | --child=*) ;;
            --print-config | --dry-run | --profile | --count | --report | *=*) ;;
            -*) fail 2 "there is no option $1: settings are written section.key=value, as in optim.lr=0.1." ;;
            *.yaml | *.yml) fail 2 "a configuration file is named by --config: write --config $1." ;;
            *) fail 2 "cannot read the argument $1: settings are written section.key=value, as in optim.lr=0.1." ;;
        esac
        shift $(($# > 0))
    done
    if [[ -n ${NPROC_PER_NODE:-} ]]; then
        check_count NPROC_PER_NODE "$NPROC_PER_NODE"
    fi
}

# --- the environment --------------------------------------------------------------------------------------------------

# "3.11" for an interpreter that runs, nothing for one that does not (as a version manager's shim of a missing one).
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_supported() { [[ $1 =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); }

# The interpreter to make .venv with: PYTHON, or the first suitable one on PATH.
find_python() {
    local candidate version
    if [[ -n ${PYTHON:-} ]]; then
        version=$(python_version "$PYTHON")
        [[ -n $version ]] || fail 2 "PYTHON=$PYTHON does not run: give the name or path of a Python >= 3.11."
        is_supported "$version" ||
            fail 2 "PYTHON=$PYTHON is Python $version: give the name or path of a Python >= 3.11."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3.14 python3; do
        if is_supported "$(python_version "$candidate")"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail 1 "no Python >= 3.11 found on PATH: install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
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

# The folder of the environment to use, in ENVIRONMENT: the active one, one that has the package, else .venv (which may
# not exist yet).
choose_environment() {
    local version python variable
    for variable in VIRTUAL_ENV CONDA_PREFIX; do
        ENVIRONMENT=${!variable:-}
        [[ -n $ENVIRONMENT ]] || continue
        version=$(python_version "$ENVIRONMENT/bin/python")
        if [[ -z $version ]]; then
            # A container started with the host's variables, or an environment that was deleted.
            say "$variable=$ENVIRONMENT has no working bin/python here and is not used"
            unset "$variable"
            continue
        fi
        is_supported "$version" ||
            fail 2 "the active environment $ENVIRONMENT has Python $version, not 3.11 or newer: activate another or none."
        if [[ -n ${PYTHON:-} ]]; then
            say "PYTHON=$PYTHON is not used: the environment $ENVIRONMENT is active"
        fi
        return
    done
    if [[ -z ${PYTHON:-} ]] && find_installed; then
        return
    fi
    ENVIRONMENT=$REPO/.venv
    version=$(python_version "$ENVIRONMENT/bin/python")
    if [[ -n ${PYTHON:-} ]]; then
        python=$(find_python)
        [[ -z $version || $(python_version "$python") == "$version" ]] ||
            fail 2 "$ENVIRONMENT was made with Python $version, not with PYTHON=$PYTHON: remove it or unset PYTHON."
    fi
}

# An environment that has the package though it is not active, in ENVIRONMENT: that of `dist-deeplab scripts`, which wrote
# its folder into launch/environment, or that of the Python on PATH, as in a container.
find_installed() {
    local recorded=$REPO/launch/environment
    if [[ -e $recorded ]]; then
        ENVIRONMENT=$(<"$recorded")
        [[ -x $ENVIRONMENT/bin/python ]] && return
    fi
    [[ ! -e $REPO/.venv ]] && ENVIRONMENT=$(python -c "
import importlib.metadata as m, sys
m.version('dist_deeplab')
print(sys.prefix)" 2>/dev/null) && [[ -x $ENVIRONMENT/bin/python ]]
}

# From here on `python`, `torchrun` and `mlflow` are those of ENVIRONMENT.
activate_environment() {
    export PATH=$ENVIRONMENT/bin:$PATH
    if [[ $ENVIRONMENT != "${CONDA_PREFIX:-}" ]]; then
        export VIRTUAL_ENV=$ENVIRONMENT
    fi
    unset PYTHONHOME
    # Messages of the package name this command, which is not on the user's own PATH.
    if [[ $ENVIRONMENT == "$REPO/.venv" ]]; then
        export DIST_DEEPLAB_COMMAND=$ENVIRONMENT/bin/dist-deeplab
    fi
}

# Use the active environment or .venv without installing anything (several nodes may start at once); else PATH as it is.
use_environment() {
    choose_environment
    if [[ -x $ENVIRONMENT/bin/python ]]; then
        activate_environment
    fi
}

# The same for the package itself, which importing would take seconds to find out.
need_package() {
    python -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("dist_deeplab")))' \
        >/dev/null 2>&1 ||
        fail 1 "dist_deeplab is not installed in this environment: pip install -e . -c constraints.txt, or any other" \
            "launcher."
}

# need_command NAME: an error that names the remedy, instead of bash's "command not found".
need_command() {
    command -v "$1" >/dev/null ||
        fail 1 "$1 is not installed in this environment: pip install -e . -c constraints.txt, or any other launcher."
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

# The package and all that it and these extras require are there, however they were installed: an environment of the
# user's is then left alone. Takes some 0.3 s.
has_package() {
    [[ ! -e $ENVIRONMENT/.dist_deeplab_unfinished ]] && "$ENVIRONMENT/bin/python" - "$1" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import requires, version

from pip._vendor.packaging.requirements import Requirement

extras = ["", *sys.argv[1].split(",")]
for line in requires("dist_deeplab") or []:
    need = Requirement(line)
    if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
        assert need.specifier.contains(version(need.name), prereleases=True), line
PY
}

# The version of the installed torch if it can be imported and is new enough, else nothing; of INTERPRETER where set.
suitable_torch() {
    "${INTERPRETER:-$ENVIRONMENT/bin/python}" - 2>/dev/null <<'PY' || true
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
    say "installing $pin (may take minutes)"
    pip_install "$pin" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
}

# Where packages are installed in ENVIRONMENT, as a venv and conda have it; nothing elsewhere.
site_packages() {
    local folder
    folder=$ENVIRONMENT/lib/python$(python_version "$ENVIRONMENT/bin/python")/site-packages
    if [[ -d $folder ]]; then printf '%s\n' "$folder"; fi
}

# pip's hundreds of lines are shown only when it fails.
pip_install() {
    local output site
    output=$(mktemp)
    site=$(site_packages)
    if ! "$ENVIRONMENT/bin/python" -m pip install --disable-pip-version-check ${site:+--no-compile} "$@" \
        >"$output" 2>&1; then
        cat "$output" >&2
        rm -f "$output"
        # pip itself gave up, it was not killed: what it has installed so far is whole.
        rm -f "$ENVIRONMENT/.dist_deeplab_unfinished"
        fail 1 "pip could not install into $ENVIRONMENT: see its message above."
    fi
    rm -f "$output"
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
    say "installing dist_deeplab${extras:+[$extras]} and what it needs (may take minutes)"
    (pip_install --editable "$REPO${extras:+[$extras]}" --constraint "$constraints") ||
        { rm -f "$constraints" && exit 1; }
    rm -f "$constraints"
    compile_packages
}

# Compile what was installed: pip would do it one file after the other, and not at all what is editable; where bytecode
# isn't written (as in many containers) each rank would do it, at each start. What can't be written to is used as it is.
compile_packages() {
    local site
    site=$(site_packages)
    say "compiling them"
    "$ENVIRONMENT/bin/python" -m compileall -qq -j 4 ${site:+"$site"} "$REPO/dist_deeplab" >/dev/null 2>&1 || true
}

# setup_environment EXTRAS: an environment with the package in it, active. Quick when nothing has changed.
setup_environment() {
    choose_environment
    # What a launcher has installed is kept up to date with the repository; the user's own installation is not touched.
    if { [[ ! -e $REPO/setup.py ]] || ! compgen -G "$ENVIRONMENT/.dist_deeplab_*" >/dev/null; } && has_package "$1"; then
        activate_environment
        return
    fi
    # Scripts that `dist-deeplab scripts` wrote come with no package to install.
    [[ -e $REPO/setup.py ]] ||
        fail 1 "dist_deeplab${1:+[$1]} is not installed in $ENVIRONMENT: activate the environment that has it."
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

# check_count NAME VALUE: refuse what is not a positive whole number.
check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "$1=$2 is not a positive whole number."
}

# set_num_threads NUM_PROCESSES: share the cores that this process may use among the processes of this machine.
set_num_threads() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}
