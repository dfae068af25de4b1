"""NVIDIA apex, where it is installed: recognised without importing it, and its optimizer and amp behind our signatures.

apex is built from source only. Its `amp` (mixed precision) was removed upstream on 2025-05-08 (commit cb65b8ed of
NVIDIA/apex); `optimizers.FusedSGD` is still there. The package named `apex` on PyPI is a toolkit for the web framework
Pyramid. None of this could be run here on a GPU; the tests run it against stand-ins.
"""

import importlib
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dist_deeplab.errors import UserError, first_line

INSTEAD_OF_SGD = "optim.implementation=torch, which is fused too"
INSTEAD_OF_AMP = "precision.backend=torch, which is torch.amp with the same precision.dtype"
_REMOVED = "it was removed on 2025-05-08 (commit cb65b8ed); a commit before that one has it"
_BUILD = (
    "build it from https://github.com/NVIDIA/apex by `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
    "--no-build-isolation .` (NVIDIA's NGC images of PyTorch have it)"
)


@dataclass(frozen=True)
class ApexInstall:
    """What goes by the name of apex in this environment."""

    version: str
    folder: Path
    is_nvidias: bool
    has_extensions: bool

    def has(self, part: str) -> bool:
        """Whether it has a subpackage, e.g. `amp`."""
        return importlib.machinery.PathFinder.find_spec(part, [str(self.folder)]) is not None


def find_apex() -> ApexInstall | None:
    """What is installed as `apex`, or None; nothing of it is run."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    about = next((d.metadata for d in metadata.distributions(name="apex")), None)
    summary = (about["Summary"] or "") if about else ""
    # A checkout that is only on the path has no metadata; NVIDIA's is then known by its layout.
    is_nvidias = "NVIDIA" in summary if summary else (folder / "optimizers" / "fused_sgd.py").is_file()
    version = (about["Version"] or "") if about else ""
    return ApexInstall(version, folder, is_nvidias, importlib.util.find_spec("amp_C") is not None)


def require_apex(key: str, part: str, instead: str) -> None:
    """Check that apex has `part`, for the configuration key `key`.

    Raises:
        UserError: not installed, another project's package, built without its extensions, or of a version without
            `part`; it says what to do, and what does the same without apex (`instead`).
    """
    found = find_apex()
    if found is None:
        raise UserError(f"{key} needs NVIDIA apex, which is not installed; {_BUILD}, or set {instead}")
    if not found.is_nvidias:
        raise UserError(
            f"{key} needs NVIDIA apex, but the installed package apex {found.version} is another project (PyPI's "
            f"toolkit for Pyramid); `pip uninstall apex` and {_BUILD}, or set {instead}"
        )
    if not found.has(part):
        why = f"; {_REMOVED}" if part == "amp" else ""
        raise UserError(f"{key} needs apex.{part}, which the apex in {found.folder} does not have{why}; set {instead}")
    if not found.has_extensions:
        raise UserError(f"{key}: the apex in {found.folder} has no CUDA extensions; {_BUILD}, or set {instead}")
    if not torch.cuda.is_available():
        raise UserError(f"{key} needs a GPU, and torch sees none; set {instead}")
    try:
        importlib.import_module("amp_C")  # after torch, whose libraries it is linked to
    except Exception as error:  # built for another torch: an ImportError about a symbol, mostly
        raise UserError(
            f"{key}: apex's extension amp_C does not work with torch {torch.__version__} ({first_line(error)}); build "
            f"it again: {_BUILD}, or set {instead}"
        ) from None


def apex_sgd(groups: list[dict[str, Any]], *, lr: float, momentum: float) -> Optimizer:
    """apex's FusedSGD: the update of torch's, with one wait for the GPU per step to know whether to skip."""
    require_apex("optim.implementation=apex", "optimizers", INSTEAD_OF_SGD)
    return importlib.import_module("apex.optimizers").FusedSGD(groups, lr=lr, momentum=momentum)
