#!/usr/bin/env bash
#
# Install the package into a container image that has a torch of its own, which is kept. launch/Containerfile runs it:
#
#     bash launch/install_in_image.sh                 # PYTHON=python3.12 for another interpreter than `python`
#     bash launch/install_in_image.sh export,crf      # with extras of setup.py
#
# Exit codes: 1 there is no torch >= 2.10, or pip failed.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"

INTERPRETER=$(command -v "${PYTHON:-python}" || command -v python3) || fail 1 "there is no Python: set PYTHON."
torch=$(suitable_torch)
[[ -n $torch ]] || fail 1 "$INTERPRETER has no torch >= 2.10 that can be imported: choose an image that has one."
say "keeping torch $torch"

# The image's Python belongs to its system, which pip (PEP 668) would refuse to change without being told.
export PIP_BREAK_SYSTEM_PACKAGES=1
kept=$(mktemp)
printf 'torch==%s\n' "$torch" >"$kept"
# NVIDIA's images constrain their own builds by PIP_CONSTRAINT; both constraints hold.
PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$kept" "$INTERPRETER" -m pip install --no-cache-dir "$REPO${1:+[$1]}" ||
    fail 1 "pip could not install into the image: see its message above."
rm -f "$kept"
# The launchers call it `python`, which some systems lack.
[[ -e ${INTERPRETER%/*}/python ]] || ln -s "$INTERPRETER" "${INTERPRETER%/*}/python"
"$INTERPRETER" -c 'import cv2, dist_deeplab, torch, webdataset; print("ready: torch", torch.__version__)'
