"""What torchrun does without our settings; a failing test says what to remove. See tests/unit/test_workarounds.py."""

import subprocess
from pathlib import Path

from tests.conftest import command_environ, torchrun_command

FAILS_ONCE = """
import os, sys
from torch.distributed import rendezvous
store, rank, ranks = next(rendezvous("env://"))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("address of a rank", "of the first attempt")
    sys.exit(1)
sys.exit(int(store.check(["address of a rank"])))
"""


def works_when_restarted(script: Path, *, own_store: str) -> bool:
    environ = command_environ() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    command = torchrun_command(1, "--max-restarts=1", str(script))
    return subprocess.run(command, env=environ, capture_output=True, timeout=120).returncode == 0


def test_a_restart_by_torchrun_alone_still_reads_stale_keys(tmp_path: Path) -> None:
    """torch 2.13: the agent keeps its store; ranks that read it would connect to processes gone (pytorch#135712)."""
    script = tmp_path / "fails_once.py"
    script.write_text(FAILS_ONCE)
    assert works_when_restarted(script, own_store="1")
    works = works_when_restarted(script, own_store="0")
    assert not works, "remove TORCH_DISABLE_SHARE_RDZV_TCP_STORE (commands/torchrun.py, launch/common.sh)"
