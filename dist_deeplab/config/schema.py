"""`RunConfig`, the keys of a configuration: typed, frozen, with the published DeepLab-v2 recipe as defaults.

The string under each key is its documentation (`--print-config` shows it). Checks that need only the values are made
here and in the sections (training.py, results.py); checks that need the world size or the data are made by whoever
knows these.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dist_deeplab.config.results import CheckpointConfig, CrfConfig, EvalConfig, TrackingConfig
from dist_deeplab.config.section import EXECUTION, NOTHING, RECIPE, Positive, Section
from dist_deeplab.config.training import (
    BatchConfig,
    DataConfig,
    DistributedConfig,
    LossConfig,
    ModelConfig,
    MultiScaleConfig,
    OptimConfig,
    PrecisionConfig,
    SpeedConfig,
)


class RunConfig(Section):
    name: Annotated[str, NOTHING] = "voc_resnet101"
    """Folder of the run under output_dir, and its name in MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**63), RECIPE] = 0
    """Fixes sample order, augmentation and initial weights."""
    max_steps: Annotated[Positive, RECIPE] = 20000
    """Optimizer steps."""
    max_hours: Annotated[Annotated[float, Field(gt=0)] | None, EXECUTION] = None
    """Save and stop (exit code 75) this many hours after the launch: before a known limit. Empty: no limit."""
    output_dir: Annotated[str, NOTHING] = "runs"
    """Folder of all runs."""
    resume: Annotated[str, NOTHING] = "auto"
    """auto: continue from the newest checkpoint; never: refuse a used folder; PATH: start a new folder from it."""
    resume_anyway: Annotated[bool, NOTHING] = False
    """Continue although the recipe or the training samples are not the checkpoint's; what differs is logged."""
    device: Annotated[Literal["auto", "cuda", "cpu"], EXECUTION] = "auto"
    """auto: a GPU per rank, the CPU where torch sees none; cuda: an error where it sees none; cpu: no GPU is used."""
    deterministic: Annotated[bool, EXECUTION] = False
    """Repeat a run bit by bit on the same hardware and number of ranks: slower algorithms on a GPU."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    multi_scale: MultiScaleConfig = MultiScaleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    speed: SpeedConfig = SpeedConfig()
    eval: EvalConfig = EvalConfig()
    crf: CrfConfig = CrfConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _name_of_a_folder(cls, value: str) -> str:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "must hold only letters A-Z and a-z, digits and . _ -, and begin with a letter or digit, e.g. "
                "voc_run-2; the folder above it is output_dir"
            )
        return value

    @field_validator("resume")
    @classmethod
    def _says_from_where(cls, value: str) -> str:
        if not value:
            raise ValueError("must be auto, never or the path of a checkpoint")
        return value

    @model_validator(mode="after")
    def _scaled_crops_on_grid(self) -> "RunConfig":
        scales, crop = self.multi_scale.scales, self.data.crop_size

        def fits(size: int) -> bool:
            return all(((size - 1) * scale) % 8 == 0 for scale in scales)

        if not fits(crop):
            fitting = sorted((size for size in range(33, 2 * crop + 64, 8) if fits(size)), key=lambda s: abs(s - crop))
            remedy = f"use data.crop_size={fitting[0]}" if fitting else "use other scales"
            raise ValueError(
                f"data.crop_size={crop} scaled by multi_scale.scales={list(scales)} is not 8k+1 each time, so logits "
                f"would miss their pixels; {remedy}"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.output_dir).expanduser() / self.name
