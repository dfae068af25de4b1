"""The sections about what comes of a run: its scores, its checkpoints, and where they are reported."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dist_deeplab.config.section import (
    EXECUTION,
    EXECUTION_EVERYWHERE,
    NOTHING,
    SCORE,
    Affects,
    Location,
    NonNegative,
    Positive,
    Section,
    Text,
)
from dist_deeplab.redaction import redact


class EvalConfig(Section):
    every: Annotated[NonNegative, EXECUTION] = 1000
    """Steps between evaluations on data.val; one more at the end. 0: only at the end."""
    batch_size: Annotated[Positive, EXECUTION_EVERYWHERE] = 4
    """Images of one size taken through the network at once; what an image scores does not depend on it."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], SCORE] = (1.0,)
    """Input scales whose logits are fused, e.g. [0.5, 0.75, 1.0] (the paper's)."""
    fusion: Annotated[Literal["max", "mean"], SCORE] = "max"
    """How logits of several scales become one: max is the paper's."""
    flip: Annotated[bool, SCORE] = False
    """Average with the prediction on the horizontally flipped image."""
    align_corners: Annotated[bool, SCORE] = True
    """true: logits sit on pixels, as in training; false: half-pixel resizing, unpadded images (kazuto1011's way)."""
    window: Annotated[int, Field(ge=33), SCORE] = 2049
    """Images with a longer side in pixels go through the network in windows of this side."""
    overlap: Annotated[NonNegative, SCORE] = 256
    """By which windows overlap at least, in pixels; their probabilities are blended there."""
    crf: Annotated[bool, SCORE] = False
    """Refine by a dense CRF (section crf); about a second of a core per image, in processes beside the GPU."""
    num_panels: Annotated[NonNegative, EXECUTION_EVERYWHERE] = 4
    """Validation images shown as image | label | prediction | errors."""
    table: Annotated[Literal["classes", "mean"], Affects("nothing", inference=True)] = "classes"
    """What an evaluation prints: a table of every class in the set, or mean: the mIoU alone. Files hold all."""

    @model_validator(mode="after")
    def _overlap_below_window(self) -> "EvalConfig":
        if self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap} must be smaller than window={self.window}")
        return self

    @field_validator("scales")
    @classmethod
    def _distinct_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("must hold one or more scales, each once")
        return value


class CrfConfig(Section):
    """The dense CRF of eval.crf; defaults are DeepLab-v2's for VOC 2012."""

    iterations: Annotated[Positive, SCORE] = 10
    """Mean-field iterations."""
    pos_w: Annotated[float, Field(ge=0), SCORE] = 3.0
    """Weight of the smoothness kernel."""
    pos_xy_std: Annotated[float, Field(gt=0), SCORE] = 1.0
    """Its standard deviation in pixels."""
    bi_w: Annotated[float, Field(ge=0), SCORE] = 4.0
    """Weight of the appearance kernel, which looks at colours too."""
    bi_xy_std: Annotated[float, Field(gt=0), SCORE] = 67.0
    """Its standard deviation in pixels."""
    bi_rgb_std: Annotated[float, Field(gt=0), SCORE] = 3.0
    """Its standard deviation in colour values of 0..255."""
    num_workers: Annotated[Positive | None, EXECUTION_EVERYWHERE] = None
    """CRF processes per rank; empty: this rank's share of the cores."""


class CheckpointConfig(Section):
    every: Annotated[Positive, EXECUTION] = 500
    """Steps between checkpoints; one more at the end."""
    keep_last: Annotated[int, Field(ge=2), EXECUTION] = 2
    """Newest checkpoints kept, beside the best; at least 2, so that a damaged one leaves another."""
    keep_every: Annotated[NonNegative, EXECUTION] = 0
    """Keep those of steps that this divides for good, e.g. 5000; 0: none."""


class TrackingConfig(Section):
    uri: Annotated[Location, NOTHING] = Location()
    """MLflow store; empty: MLFLOW_TRACKING_URI, else SQLite in <output_dir>/mlflow.db; none: no MLflow."""
    experiment: Annotated[str, NOTHING] = "dist_deeplab"
    """MLflow experiment that holds the run."""
    log_every: Annotated[Positive, NOTHING] = 20
    """Steps between log lines and metric points; each costs one CPU-GPU synchronisation."""
    system_metrics: Annotated[bool, NOTHING] = False
    """Record load, memory, network and GPUs of every node each 10 s."""
    log_model: Annotated[bool, NOTHING] = False
    """After the last step log the best checkpoint as an MLflow model: image in, mask out."""
    register_as: Annotated[Text, NOTHING] = ""
    """Name in MLflow's model registry under which that model becomes a new version (implies log_model); no / or :."""
    parent: Annotated[Text, NOTHING] = ""
    """Folder of the sweep that this run is of, seen from its own; a sweep sets it."""

    on_event: Annotated[Text, NOTHING] = ""
    """Shell command for alerts, run when training starts, finishes, fails or stops: $DIST_DEEPLAB_EVENT says which."""

    @field_validator("uri")
    @classmethod
    def _without_secrets(cls, value: Location) -> Location:
        is_database_user = re.fullmatch(r"(?!https?:)[\w+]+://[^:@/?]+@[^?]*", value.real)
        if redact(value.real, {}) != value.real and not is_database_user:
            raise ValueError(
                "must not hold a password, which would end up in files and records; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or for a database MLFLOW_TRACKING_URI"
            )
        return value

    @field_validator("register_as")
    @classmethod
    def _registry_takes(cls, value: str) -> str:
        if re.search("[/:]", value):
            raise ValueError("must not hold / or :, which MLflow's addresses of models are made of; e.g. voc-deeplab")
        return value
