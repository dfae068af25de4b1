"""`Checkpoint`: what a checkpoint file holds, with types; read, checked and turned back into plain values here."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_deeplab.checkpointing.file import load_content
from dist_deeplab.config import RunConfig, config_from_dict, config_to_dict
from dist_deeplab.distributed.from_main import load_on_main
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import Variant

_FOR_INFERENCE = ("model", "variant", "config", "class_names")
_NEEDED = (*_FOR_INFERENCE, "optimizer", "step", "train_keys_sha256")
_BESIDE_THE_STATE = (
    *("format", "variant", "config", "class_names", "mlflow_run_id", "versions"),
    *("train_keys_sha256", "train_key_hashes", "train_contents", "train_index_sha256"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A run at one step: its state, and what evaluation, prediction and a resume need to know beside it.

    state: tensors and plain values of `TrainState.state_dict()`; of a model that is served, the network's tensors only.
    config: the run's configuration. variant: what the network is, its preprocessing included. class_names: by label.
    train_keys_sha256: digest of the training samples' keys. train_key_hashes: int64 [n], to recognise images that the
    network was trained on; None: not known. train_contents: digest of the images and labels, and train_index_sha256: of
    the file that lists them; or empty. mlflow_run_id: of the run's page, or empty. versions: {library: version}.
    path: the file it was read from.
    """

    state: Mapping[str, Any]
    config: RunConfig
    variant: Variant
    class_names: tuple[str, ...]
    train_keys_sha256: str = ""
    train_key_hashes: torch.Tensor | None = None
    train_contents: str = ""
    train_index_sha256: str = ""
    mlflow_run_id: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def network(self) -> Mapping[str, torch.Tensor]:
        """The network's tensors by name."""
        tensors: Mapping[str, torch.Tensor] = self.state["model"]
        return tensors

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state.get("step", 0))

    @property
    def micro_size(self) -> int:
        """The most images of a micro-batch, as found out for `batch.micro_size=auto`; 0: not known."""
        return int(self.state.get("micro_size", 0))

    @property
    def best_miou(self) -> float:
        """The run's best score so far, in 0..1; -1: none."""
        return float(self.state.get("best_miou", -1.0))

    @property
    def pending_evaluation(self) -> bool:
        """Whether the run stopped during an evaluation, which the next start makes up for."""
        return bool(self.state.get("owes_evaluation", False))

    def __str__(self) -> str:
        return str(self.path) if self.path else f"the checkpoint of step {self.step}"

    def without_score(self) -> "Checkpoint":
        """The same, for a run whose folder has no file with the best score."""
        return dataclasses.replace(self, state={**self.state, "best_miou": -1.0})

    def for_inference(self) -> dict[str, Any]:
        """Tensors and plain values that `from_content` needs for a network without its training."""
        content = self.to_content()
        return {name: content[name] for name in _FOR_INFERENCE}

    def to_content(self) -> dict[str, Any]:
        """Tensors and plain values for a file."""
        content = {
            **self.state,
            "variant": self.variant.to_plain(),
            "config": config_to_dict(self.config),
            "class_names": list(self.class_names),
            "train_keys_sha256": self.train_keys_sha256,
        }
        if self.train_key_hashes is not None:
            content["train_key_hashes"] = self.train_key_hashes
        about = {"train_contents": self.train_contents, "train_index_sha256": self.train_index_sha256}
        return content | about | {"mlflow_run_id": self.mlflow_run_id, "versions": dict(self.versions)}

    @classmethod
    def from_content(cls, content: Mapping[str, Any], *, path: Path | None = None) -> "Checkpoint":
        """The checkpoint that a file's content is.

        Raises:
            UserError: something that a network needs is missing or not what it should be.
        """
        where = str(path) if path else "the checkpoint"
        missing = [name for name in _FOR_INFERENCE if name not in content]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}; use another checkpoint")
        try:
            return cls(
                state={name: value for name, value in content.items() if name not in _BESIDE_THE_STATE},
                config=config_from_dict(content["config"], where=where),
                variant=Variant.from_plain(content["variant"]),
                class_names=tuple(map(str, content["class_names"])),
                train_keys_sha256=str(content.get("train_keys_sha256", "")),
                train_key_hashes=content.get("train_key_hashes"),
                train_contents=str(content.get("train_contents", "")),
                train_index_sha256=str(content.get("train_index_sha256", "")),
                mlflow_run_id=str(content.get("mlflow_run_id") or ""),
                versions=dict(content.get("versions") or {}),
                path=path,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where} does not say what network it is of; use another checkpoint") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint that holds all that a run, evaluation and prediction need; no code in the file is run.

    Raises:
        DamagedCheckpoint: missing or damaged.
        UserError: incomplete, or not a checkpoint of ours.
    """
    content = load_content(path)
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise UserError(f"the checkpoint {path} lacks {', '.join(missing)}; use another one")
    return Checkpoint.from_content(content, path=path)


def load_checkpoint(env: DistEnv, path: Path) -> Checkpoint:
    """`read_checkpoint` by the main rank for all; every rank must call it.

    Raises:
        UserError: see `read_checkpoint`.
    """
    checkpoint = read_on_main(env, lambda: read_checkpoint(path))
    assert checkpoint is not None
    return checkpoint


def read_on_main(env: DistEnv, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What `read` gives on the main rank, on every rank; every rank must call it. See `load_on_main`.

    Raises:
        UserError: `read` raised it.
    """

    def plain() -> tuple[str, dict[str, Any]] | None:
        checkpoint = read()
        return (str(checkpoint.path), checkpoint.to_content()) if checkpoint else None

    found = load_on_main(env, plain)
    return Checkpoint.from_content(found[1], path=Path(found[0])) if found else None


def find_best(run_dir: Path) -> Path:
    """The file of a run's best checkpoint, or of its newest where nothing was scored.

    Raises:
        UserError: there is none.
    """
    folder = run_dir / "checkpoints"
    found = [folder / "best.pt"] if (folder / "best.pt").exists() else sorted(folder.glob("step_*.pt"))
    if not found:
        raise UserError(f"no checkpoint in {folder}; train first")
    return found[-1]
