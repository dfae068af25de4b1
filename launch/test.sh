#!/usr/bin/env bash
#
# Run the tests, in the active environment or in .venv, which is set up first:
#
#     ./launch/test.sh                                # everything, on all cores
#     ./launch/test.sh --quick                        # each promise in its smallest form
#     ./launch/test.sh tests/unit -k order -x         # arguments go to pytest
#     ./launch/test.sh -n 0 --pdb tests/unit          # in this process, for a debugger
#     ./launch/test.sh -m "not slurm and not browser" # without the tests that need system packages
#     EXTRAS=test,crf ./launch/test.sh                # with another choice of extras installed (see setup.py)
#
# Tests that need something this machine lacks (Slurm, Chromium, shellcheck, a GPU) are skipped and say why.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
setup_environment "${EXTRAS:-test}"
cd "$REPO"
if [[ ${1:-} == --quick ]]; then
    set -- -m quick "${@:2}"
fi
# pytest-xdist: how many workers, which tests share one and which come first is in tests/conftest.py.
exec python -m pytest -n auto --dist loadscope --no-loadscope-reorder "$@"
