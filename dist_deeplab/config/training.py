"""The sections that shape an optimizer step: data, network, batch, loss, optimizer, precision, speed, processes."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dist_deeplab.config.section import (
    EXECUTION,
    EXECUTION_EVERYWHERE,
    ORIGIN,
    RECIPE,
    RECIPE_EVERYWHERE,
    Location,
    NonNegative,
    Positive,
    Section,
    Text,
)


class DataConfig(Section):
    train: Annotated[Location, ORIGIN] = Location()
    """Manifest of the training shards, e.g. data/voc/train.json (`dist-deeplab shards` writes it)."""
    val: Annotated[Location, ORIGIN] = Location()
    """Manifest of the validation shards; empty: train without evaluation."""
    num_classes: Annotated[int, Field(ge=2, le=255), RECIPE] = 21
    """Classes including background; labels are 0 .. num_classes-1. Not given: as many as data.train has."""
    ignore_label: Annotated[int, Field(ge=0, le=255), RECIPE] = 255
    """Label of void pixels: no loss, no score. Padding gets it too. Not given: that of data.train."""
    scale_range: Annotated[tuple[float, float], RECIPE] = (0.5, 1.5)
    """Random scale is uniform in [low, high]."""
    scale_step: Annotated[float, Field(ge=0), RECIPE] = 0.0
    """Draw the scale from low, low + step, ... high instead; 0.25 gives the authors' 0.5, 0.75, 1, 1.25 and 1.5."""
    flip: Annotated[bool, RECIPE] = True
    """Flip horizontally with probability 1/2."""
    photometric: Annotated[bool, RECIPE] = False
    """Distort brightness, contrast, saturation and hue, each with probability 1/2, as SSD and mmsegmentation do."""
    crop_size: Annotated[int, Field(ge=1, le=8193), RECIPE] = 321
    """Side of the square training crop in pixels; 8k+1 keeps logits on the pixel grid."""
    num_workers: Annotated[int, Field(ge=0, le=256), EXECUTION_EVERYWHERE] = 4
    """Loader processes per rank; 0 decodes in the training process."""
    access: Annotated[Literal["indexed", "stream"], RECIPE] = "indexed"
    """indexed: exact order, any split, exact resume; stream: best effort, for sets that fit on no disk of a node."""
    shuffle: Annotated[Literal["full", "blocks"], RECIPE] = "full"
    """full: all samples together; blocks: within windows of a few shards, for sets that no page cache or disk holds."""
    window_shards: Annotated[Positive, RECIPE] = 4
    """shuffle=blocks: shards among whose samples is shuffled; a cache holds 3 windows of each of a node's groups."""
    canonical_groups: Annotated[Positive, RECIPE] = 16
    """shuffle=blocks: parts of the set that are read side by side; a multiple of the numbers of nodes you will use."""
    repeat_threshold: Annotated[float, Field(ge=0, le=1), RECIPE] = 0.0
    """Repeat images of classes that fewer than this share of images contain (repeat factors of LVIS); 0: once each."""
    cache_dir: Annotated[Text, EXECUTION_EVERYWHERE] = ""
    """Folder on a disk of each node, in which shards of data.train and data.val that are URLs get a subfolder."""
    cache_gib: Annotated[float, Field(gt=0), EXECUTION_EVERYWHERE] = 200.0
    """Largest size of that subfolder in GiB; shards unused for longest go first."""
    max_bad_samples: Annotated[NonNegative, EXECUTION] = 0
    """Training samples that may be damaged: they are replaced, counted and listed; one more ends the run."""

    @model_validator(mode="after")
    def _blocks_are_indexed(self) -> "DataConfig":
        if self.access == "stream" and self.shuffle == "blocks":
            raise ValueError("data.access=stream has a shuffle of its own: leave out data.shuffle=blocks")
        return self

    @model_validator(mode="after")
    def _repeats_are_shuffled_in_full(self) -> "DataConfig":
        if self.repeat_threshold and (self.access, self.shuffle) != ("indexed", "full"):
            raise ValueError(
                "data.repeat_threshold needs data.access=indexed and data.shuffle=full: set these, or leave it at 0"
            )
        return self

    @model_validator(mode="after")
    def _whole_scale_steps(self) -> "DataConfig":
        low, high = self.scale_range
        steps = (high - low) / self.scale_step if self.scale_step else 0.0
        if abs(steps - round(steps)) > 1e-6:
            raise ValueError(f"data.scale_step={self.scale_step:g} must divide data.scale_range={[low, high]} evenly")
        return self

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
    backbone: Annotated[Literal["resnet101", "resnet50", "resnet_tiny"], RECIPE] = "resnet101"
    """resnet101 is the paper's; resnet_tiny is a small bottleneck network for trying things out on a CPU."""
    batch_norm: Annotated[Literal["sync", "frozen", "local"], RECIPE] = "sync"
    """sync: statistics over all ranks; frozen: stored statistics and affine kept (paper); local: per rank."""
    sync_bn: Annotated[Literal["own", "torch"], EXECUTION] = "own"
    """Implementation behind `sync`; torch's own works on CUDA only."""
    init: Annotated[Location, ORIGIN] = Location()
    """Weights to start from, a file of any known family or its URL (#sha256=HEX checks it); empty: random weights."""
    train_only: Annotated[Literal["all", "head"], RECIPE] = "all"
    """head: train the last layers alone on a frozen backbone, its batch norm too (fine_tune.py)."""
    restore_last: Annotated[bool, ORIGIN] = True
    """Take the last layer from `init` too; false for a data set with other classes (not_restore_last)."""
    mean_bgr: Annotated[tuple[Annotated[float, Field(ge=0, le=255)], ...], RECIPE] = ()
    """Mean colour subtracted from images, [blue, green, red] in 0..255, kept in checkpoints. Empty: the weights'."""

    @field_validator("mean_bgr")
    @classmethod
    def _three_channels(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (0, 3):
            raise ValueError("must be [blue, green, red], e.g. [104.008, 116.669, 122.675], or empty")
        return value

    @property
    def batch_norm_used(self) -> Literal["sync", "frozen", "local"]:
        """`batch_norm`, but frozen with a frozen backbone, as DrSleep's fine_tune.py has it by default."""
        return "frozen" if self.train_only == "head" else self.batch_norm


class BatchConfig(Section):
    global_size: Annotated[Positive, RECIPE] = 10
    """Images of one optimizer step, over all ranks and accumulation steps; any number from that of the ranks on."""
    micro_size: Annotated[Positive | Literal["auto"] | None, EXECUTION] = None
    """The most images a rank takes through the network at once; empty: its share; auto: what fits, by trying."""


class LossConfig(Section):
    average: Annotated[Literal["pixels", "images"], RECIPE] = "pixels"
    """pixels: mean over all valid pixels of the step; images: mean of the images' own means (the authors' solver)."""
    class_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...] | Literal["auto"], RECIPE] = ()
    """Weight of each class in that mean, e.g. [0.5, 2.0] for two classes. auto: in inverse proportion to the pixels of
    data.train's classes, all together / (classes x the class's own). Empty: all 1."""

    @field_validator("class_weights")
    @classmethod
    def _some_class_counts(cls, value: tuple[float, ...] | Literal["auto"]) -> tuple[float, ...] | Literal["auto"]:
        if value and value != "auto" and not any(value):
            raise ValueError("must have a weight above 0; empty ([]) weighs all classes alike")
        return value


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0), RECIPE] = 2.5e-4
    """Base learning rate: x1 backbone, x10 head weights, x20 head biases."""
    momentum: Annotated[float, Field(ge=0, lt=1), RECIPE] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0), RECIPE] = 5e-4
    """L2 on convolution weights; biases and batch norm have none."""
    power: Annotated[float, Field(ge=0), RECIPE] = 0.9
    """Exponent of the poly schedule lr * (1 - step / max_steps) ^ power."""
    warmup_steps: Annotated[NonNegative, RECIPE] = 0
    """Steps over which the rate rises linearly to the schedule; the paper has none."""
    clip_norm: Annotated[float, Field(ge=0), RECIPE] = 0.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""
    implementation: Annotated[Literal["torch", "apex"], EXECUTION] = "torch"
    """Who makes the update, which is the same: torch's fused SGD, or FusedSGD of NVIDIA apex (on a GPU)."""


class MultiScaleConfig(Section):
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], RECIPE] = ()
    """Input scales trained together, e.g. [1.0, 0.75, 0.5]; each and their max get a loss. Empty: one scale."""
    full_grid: Annotated[tuple[float, ...], RECIPE] = ()
    """Scales whose loss is taken on logits resized to the full grid, not on their own; the authors' are [0.75]."""

    @field_validator("scales")
    @classmethod
    def _has_full_scale(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and (1.0 not in value or len(set(value)) != len(value) or len(value) < 2):
            raise ValueError("must hold 1.0 and one or more other scales, each once, or be empty")
        return value

    @model_validator(mode="after")
    def _smaller_scales_are_zoomed(self) -> "MultiScaleConfig":
        possible = [scale for scale in self.scales if scale < 1]
        if unknown := [scale for scale in self.full_grid if scale not in possible]:
            raise ValueError(
                f"multi_scale.full_grid has {unknown[0]:g}, which is not among the smaller ones ({possible}) of "
                "multi_scale.scales"
            )
        return self


class PrecisionConfig(Section):
    dtype: Annotated[Literal["auto", "fp32", "tf32", "bf16", "fp16"], RECIPE_EVERYWHERE] = "auto"
    """Arithmetic of the forward pass, by torch.amp (AMP), fp16 with a gradient scaler. auto: what all devices of the
    run are made for (bf16 from Ampere GPUs and AMX CPUs on, fp16 on Volta and Turing, else fp32), kept on resume."""
    backend: Annotated[Literal["torch", "apex"], RECIPE] = "torch"
    """Who mixes precisions: torch.amp, or apex.amp (fp16 on a GPU; in NVIDIA apex until May 2025)."""
    max_nonfinite_steps: Annotated[Positive, EXECUTION] = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; their updates are skipped."""

    @model_validator(mode="after")
    def _apex_is_fp16(self) -> "PrecisionConfig":
        if self.backend == "apex" and self.dtype not in ("fp16", "auto"):
            raise ValueError("precision.backend=apex mixes fp32 with fp16: set precision.dtype=fp16 too")
        return self


class SpeedConfig(Section):
    channels_last: Annotated[bool, EXECUTION] = True
    """Channels-last memory, which tensor cores and CPU kernels want."""
    cudnn_benchmark: Annotated[bool, EXECUTION] = True
    """Let cuDNN try its algorithms on the first steps; false: its default choice, the same in each run."""
    compile: Annotated[bool, EXECUTION] = False
    """torch.compile the network: a minute or more at each start, faster steps after it."""
    recompute: Annotated[bool, EXECUTION] = False
    """Recompute activations in the backward pass: a third more arithmetic for a fraction of the memory."""
    compress_gradients: Annotated[bool, RECIPE] = False
    """All-reduce gradients in bf16: half the traffic between nodes, rounded gradients."""
    static_graph: Annotated[bool, EXECUTION] = False
    """Promise DDP that the network never changes: the same gradients; no faster on two CPU ranks."""
    cuda_graph: Annotated[bool, EXECUTION] = False
    """Launch the network as CUDA graphs, which is compared with plain launches first. Not tried on a GPU yet."""

    @model_validator(mode="after")
    def _compile_or_recompute(self) -> "SpeedConfig":
        if self.compile and self.recompute:
            raise ValueError("compile and recompute do not go together; the compiler has its own recomputation")
        return self


class DistributedConfig(Section):
    startup_timeout_s: Annotated[float, Field(ge=1), EXECUTION] = 600.0
    """How long to wait at the start until all processes have met; then the missing ones are named."""
    hang_timeout_s: Annotated[float, Field(ge=1), EXECUTION] = 1800.0
    """A run without progress for this long ends: the stuck rank is named and all stacks are in logs/."""


def grid_size(value: int) -> int:
    """The size 8k+1 (at least 33) nearest to `value`: corner-aligned sizes of an output stride of 8."""
    return max(33, round((value - 1) / 8) * 8 + 1)
