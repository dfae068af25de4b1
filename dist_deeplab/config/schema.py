"""The keys of a configuration: typed, frozen, with the published DeepLab-v2 recipe as defaults.

The string under each key is its documentation (`--print-config` shows it). Checks that need only the values are made
here; checks that need the world size or the data are made by whoever knows these.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A string; `key=` on the command line and `key:` in YAML mean the empty one."""


class Section(BaseModel):
    """A frozen group of keys; the string under each key is its documentation (`--print-config` shows it)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if cls.model_fields[info.field_name or ""].annotation is not bool:
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(v, bool) for v in values):
                raise ValueError("must not be true or false (YAML reads yes, no, on and off as these too)")
        return value


class DataConfig(Section):
    train: Text = ""
    """Manifest of the training shards, e.g. data/voc/train.json (tools/make_shards.py writes it)."""
    val: Text = ""
    """Manifest of the validation shards; empty: train without evaluation."""
    num_classes: Annotated[int, Field(ge=2, le=255)] = 21
    """Classes including background; labels are 0 .. num_classes-1."""
    ignore_label: Annotated[int, Field(ge=0, le=255)] = 255
    """Label of void pixels: no loss, no score. Padding gets it too."""
    scale_range: tuple[float, float] = (0.5, 1.5)
    """Random scale is uniform in [low, high]."""
    mirror: bool = True
    """Mirror left-right with probability 1/2."""
    crop_size: Annotated[int, Field(ge=1, le=8193)] = 321
    """Side of the square training crop in pixels; 8k+1 keeps logits on the pixel grid."""
    num_workers: Annotated[int, Field(ge=0, le=256)] = 4
    """Loader processes per rank; 0 decodes in the training process."""
    access: Literal["indexed", "stream"] = "indexed"
    """indexed: exact order, any split, exact resume; stream: best effort, for sets that fit on no disk of a node."""
    cache_dir: Text = ""
    """Folder on a disk of each node for the shards of data.train and data.val that are URLs."""
    cache_gib: Annotated[float, Field(gt=0)] = 200.0
    """Largest size of that folder in GiB; shards unused for longest go first."""
    max_bad_samples: NonNegative = 0
    """Training samples that may be damaged: they are replaced, counted and listed; one more ends the run."""

    @field_validator("crop_size")
    @classmethod
    def _crop_on_grid(cls, value: int) -> int:
        if value % 8 != 1 or value < 33:
            raise ValueError(f"must be 8k+1 and at least 33, so that logits sit on pixels; nearest: {grid_size(value)}")
        return value

    @field_validator("scale_range")
    @classmethod
    def _ordered_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be [low, high] with 0 < low <= high")
        return value


class ModelConfig(Section):
    backbone: Literal["resnet101", "resnet50", "resnet_tiny"] = "resnet101"
    """resnet101 is the paper's; resnet_tiny is a small bottleneck network for trying things out on a CPU."""
    batch_norm: Literal["sync", "frozen", "local"] = "sync"
    """sync: statistics over all ranks; frozen: stored statistics and affine kept (paper); local: per rank."""
    sync_bn: Literal["own", "torch"] = "own"
    """Implementation behind `sync`; torch's own works on CUDA only."""
    init: Text = ""
    """Weights to start from, a file of any known family or its URL (#sha256=HEX checks it); empty: random weights."""
    train_only: Literal["all", "head"] = "all"
    """head: train the last layers alone on a backbone that stands still, its batch norm too (fine_tune.py)."""
    restore_last: bool = True
    """Take the last layer from `init` too; false for a data set with other classes (not_restore_last)."""


class BatchConfig(Section):
    global_size: Positive = 10
    """Images of one optimizer step, over all ranks and accumulation steps; any number from that of the ranks on."""
    micro_size: Positive | Literal["auto"] | None = None
    """The most images a rank takes through the network at once; empty: its share; auto: what fits, by trying."""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 2.5e-4
    """Base learning rate: x1 backbone, x10 head weights, x20 head biases."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 on convolution weights; biases and batch norm have none."""
    power: Annotated[float, Field(ge=0)] = 0.9
    """Exponent of the poly schedule lr * (1 - step / max_steps) ^ power."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly to the schedule; the paper has none."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""
    implementation: Literal["torch", "apex"] = "torch"
    """Who makes the update, which is the same: torch's fused SGD, or FusedSGD of NVIDIA apex (on a GPU)."""


class MultiScaleConfig(Section):
    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Input scales trained together, e.g. [1.0, 0.75, 0.5]; each and their max get a loss. Empty: one scale."""

    @field_validator("scales")
    @classmethod
    def _has_full_scale(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and (1.0 not in value or len(set(value)) != len(value) or len(value) < 2):
            raise ValueError("must hold 1.0 and one or more other scales, each once, or be empty")
        return value


class PrecisionConfig(Section):
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; bf16 and fp16 by torch.amp, fp16 with a gradient scaler."""
    backend: Literal["torch", "apex"] = "torch"
    """Who mixes precisions: torch.amp, or apex.amp (fp16 on a GPU; in NVIDIA apex until May 2025)."""
    max_nonfinite_steps: Positive = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; their updates are skipped."""

    @model_validator(mode="after")
    def _apex_is_fp16(self) -> "PrecisionConfig":
        if self.backend == "apex" and self.dtype != "fp16":
            raise ValueError("precision.backend=apex mixes fp32 with fp16: set precision.dtype=fp16 too")
        return self


class SpeedConfig(Section):
    channels_last: bool = True
    """Channels-last memory, which tensor cores and CPU kernels want."""
    cudnn_benchmark: bool = True
    """Let cuDNN try its algorithms on the first steps; false: its default choice, the same in each run."""
    compile: bool = False
    """torch.compile the network: a minute or more at each start, faster steps after it."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more arithmetic for a fraction of the memory."""
    compress_gradients: bool = False
    """All-reduce gradients in bf16: half the traffic between nodes, rounded gradients."""
    static_graph: bool = False
    """Promise DDP that the network never changes: the same gradients; no faster on two CPU ranks."""

    @model_validator(mode="after")
    def _compile_or_recompute(self) -> "SpeedConfig":
        if self.compile and self.recompute:
            raise ValueError("compile and recompute do not go together; the compiler has its own recomputation")
        return self


class EvalConfig(Section):
    every: NonNegative = 1000
    """Steps between evaluations on data.val; one more at the end. 0: only at the end."""
    batch_size: Positive = 4
    """Images of one size taken through the network at once; what an image scores does not depend on it."""
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = (1.0,)
    """Input scales whose logits are fused, e.g. [0.5, 0.75, 1.0] (the paper's)."""
    fusion: Literal["max", "mean"] = "max"
    """How logits of several scales become one: max is the paper's."""
    flip: bool = False
    """Average with the prediction on the mirrored image."""
    align_corners: bool = True
    """true: logits sit on pixels, as in training; false: half-pixel resizing, unpadded images (kazuto1011's way)."""
    crf: bool = False
    """Refine by a dense CRF (section crf); about a second of a core per image, in processes beside the GPU."""
    num_panels: NonNegative = 4
    """Validation images shown as image | label | prediction | errors."""

    @field_validator("scales")
    @classmethod
    def _distinct_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("must hold one or more scales, each once")
        return value


class CrfConfig(Section):
    """The dense CRF of eval.crf; defaults are DeepLab-v2's for VOC 2012."""

    iterations: Positive = 10
    """Mean-field iterations."""
    pos_w: Annotated[float, Field(ge=0)] = 3.0
    """Weight of the smoothness kernel."""
    pos_xy_std: Annotated[float, Field(gt=0)] = 1.0
    """Its standard deviation in pixels."""
    bi_w: Annotated[float, Field(ge=0)] = 4.0
    """Weight of the appearance kernel, which looks at colours too."""
    bi_xy_std: Annotated[float, Field(gt=0)] = 67.0
    """Its standard deviation in pixels."""
    bi_rgb_std: Annotated[float, Field(gt=0)] = 3.0
    """Its standard deviation in colour values of 0..255."""
    num_workers: Positive | None = None
    """CRF processes per rank; empty: this rank's share of the cores."""


class CheckpointConfig(Section):
    every: Positive = 500
    """Steps between checkpoints; one more at the end."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept, beside the best; at least 2, so that a damaged one leaves another."""
    keep_every: NonNegative = 0
    """Keep those of steps that this divides for good, e.g. 5000; 0: none."""


class DistributedConfig(Section):
    startup_timeout_s: Annotated[float, Field(ge=1)] = 600.0
    """How long to wait at the start until all processes have met; then the missing ones are named."""
    hang_timeout_s: Annotated[float, Field(ge=1)] = 1800.0
    """A run without progress for so long ends: the stuck rank is named and all stacks are in logs/."""


class TrackingConfig(Section):
    uri: Text = ""
    """MLflow store; empty: MLFLOW_TRACKING_URI, else SQLite in <output_dir>/mlflow.db; none: no MLflow."""
    experiment: str = "dist_deeplab"
    """MLflow experiment that holds the run."""
    log_every: Positive = 20
    """Steps between log lines and metric points; each costs one CPU-GPU synchronisation."""
    system_metrics: bool = False
    """Record load, memory, network and GPUs of every node each 10 s."""
    log_model: bool = False
    """After the last step log the best checkpoint as an MLflow model: image in, mask out."""
    register_as: Text = ""
    """Name in MLflow's model registry under which that model becomes a new version (implies log_model); no / or :."""
    parent: Text = ""
    """Folder of the sweep that this run is of, seen from its own; launch/sweep.sh sets it."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if re.search(r"://[^/@\s]*:[^/@\s]*@", value):
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


class RunConfig(Section):
    name: str = "voc_resnet101"
    """Folder of the run under output_dir, and its name in MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes sample order, augmentation and initial weights."""
    max_steps: Positive = 20000
    """Optimizer steps."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and stop (exit code 75) after so many hours since the launch: before a known limit. Empty: no limit."""
    output_dir: str = "runs"
    """Folder of all runs."""
    resume: str = "auto"
    """auto: go on from the run's newest checkpoint; never: refuse a used folder; PATH: start a new folder from it."""
    resume_anyway: bool = False
    """Go on although the recipe or the training samples are not the checkpoint's; what differs is logged."""
    deterministic: bool = False
    """Repeat a run bit by bit on the same hardware and number of ranks: slower algorithms on a GPU."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
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


def grid_size(value: int) -> int:
    """Return the size 8k+1 (at least 33) nearest to `value`: corner-aligned sizes of an output stride of 8."""
    return max(33, round((value - 1) / 8) * 8 + 1)
