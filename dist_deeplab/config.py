"""`RunConfig`: everything that defines a run, typed, frozen and checked.

A configuration is made of the defaults below (the published DeepLab-v2 recipe), a YAML file that changes some of
them, and `section.key=value` overrides from the command line, in this order. An unknown key is an error that names
the nearest key. Checks that need only the values are made here; checks that need the world size or the data are
made by whoever knows these.
"""

import copy
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dist_deeplab.errors import UserError

_FREE_TO_CHANGE = (
    *("name", "output_dir", "resume", "data.train", "data.val", "data.num_workers", "model.init", "model.restore_last"),
    *("model.sync_bn", "batch.micro_size", "eval.", "checkpoint.", "tracking."),
)
_YAML_END = "...\n"  # what PyYAML closes a bare scalar with

_KNOWN_ELSEWHERE_AS = {
    "accumulation_steps": "batch.micro_size",
    "batch_size": "batch.global_size",
    "data_dir": "data.train",
    "data_list": "data.train",
    "grad_update_every": "batch.micro_size",
    "input_size": "data.crop_size",
    "is_training": "model.batch_norm",
    "learning_rate": "optim.lr",
    "not_restore_last": "model.restore_last",
    "num_steps": "max_steps",
    "random_mirror": "data.mirror",
    "random_scale": "data.scale_range",
    "random_seed": "seed",
    "restore_from": "model.init",
    "save_num_images": "eval.num_panels",
    "save_pred_every": "checkpoint.every",
    "snapshot_dir": "output_dir",
}
"""Names of the same settings in DrSleep's and others' scripts, for the hint in an error."""

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
    """Weights to start from (a checkpoint of ours or a ResNet state dict); empty: random weights."""
    restore_last: bool = True
    """Take the last layer from `init` too; false for a data set with other classes (not_restore_last)."""


class BatchConfig(Section):
    global_size: Positive = 10
    """Images of one optimizer step, over all ranks and accumulation steps."""
    micro_size: Positive | None = None
    """Images a rank takes through the network at once; empty: its whole share, no accumulation."""


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


class EvalConfig(Section):
    every: NonNegative = 1000
    """Steps between evaluations on data.val; one more at the end. 0: only at the end."""
    num_panels: NonNegative = 4
    """Validation images shown as image | label | prediction | errors."""


class CheckpointConfig(Section):
    every: Positive = 500
    """Steps between checkpoints; one more at the end."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept, beside the best; at least 2, so that a damaged one leaves another."""


class TrackingConfig(Section):
    uri: Text = ""
    """MLflow store; empty: MLFLOW_TRACKING_URI, else SQLite in <output_dir>/mlflow.db; none: no MLflow."""
    experiment: str = "dist_deeplab"
    """MLflow experiment that holds the run."""
    log_every: Positive = 20
    """Steps between log lines and metric points; each costs one CPU-GPU synchronisation."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "voc_resnet101"
    """Folder of the run under output_dir, and its name in MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes sample order, augmentation and initial weights."""
    max_steps: Positive = 20000
    """Optimizer steps."""
    output_dir: str = "runs"
    """Folder of all runs."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """auto: go on from the run's newest checkpoint; never: refuse a used folder; PATH: start a new folder from it."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    multi_scale: MultiScaleConfig = MultiScaleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

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


_SECTIONS: dict[str, type[Section]] = {name: type(value) for name, value in RunConfig() if isinstance(value, Section)}


def grid_size(value: int) -> int:
    """Return the size 8k+1 (at least 33) nearest to `value`: corner-aligned sizes of an output stride of 8."""
    return max(33, round((value - 1) / 8) * 8 + 1)


def load_config(
    path: str | Path | None, overrides: Iterable[str] = (), *, base: dict[str, Any] | None = None
) -> RunConfig:
    """Return the defaults, changed by the YAML file `path` (None: no file), changed by `section.key=value` strings.

    `base`, nested plain values as `config_to_dict` gives them, stands in for a file.

    Values of overrides are YAML: `data.scale_range=[0.5,1.5]`, `data.mirror=false`, `model.init=`.

    Raises:
        UserError: file missing or not YAML; unknown key (the nearest one is named); value of a wrong type or range.
    """
    values: dict[str, Any] = copy.deepcopy(base or {})
    if path is not None:
        values = _read_yaml(Path(path))
        _check_keys(values, where=str(path))
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values, where=str(path) if path is not None else "the command line")


def config_from_dict(values: dict[str, Any], *, where: str) -> RunConfig:
    """Return the RunConfig of nested `values`; `where` names their origin in errors.

    Raises:
        UserError: unknown key, or value of a wrong type or range.
    """
    _check_keys(values, where=where)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            (f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: " if e["loc"] else "")
            + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        ]
        raise UserError(f"configuration from {where} (with overrides): {'; '.join(problems)}") from None


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return nested plain values (str, int, float, bool, None, list) that `config_from_dict` takes back."""
    return config.model_dump(mode="json")


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return {"section.key": plain value} in the order of definition."""
    flat: dict[str, Any] = {}
    for key, value in config_to_dict(config).items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def config_to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML, each key preceded by its documentation; `load_config` reads it back."""
    lines = []
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            lines.append(f"\n{name}:")
            for key, sub in type(value).model_fields.items():
                lines += [f"  # {sub.description}", f"  {_yaml_line(key, getattr(value, key))}"]
        else:
            lines += [f"# {field.description}", _yaml_line(name, value)]
    return "\n".join(lines) + "\n"


def recipe_differences(saved: dict[str, Any], current: RunConfig) -> list[str]:
    """Return `key: saved -> current` for every key that decides what a run computes and that has changed.

    Paths, loader workers, the micro-batch, how often things happen and where they are reported may change.
    """
    old, new = flatten(config_from_dict(saved, where="the checkpoint")), flatten(current)
    return [
        f"{key}: {old[key]} -> {new[key]}"
        for key in new
        if old[key] != new[key] and not key.startswith(_FREE_TO_CHANGE) and not isinstance(new[key], dict)
    ]


def _yaml_line(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{key}: {text.removesuffix(_YAML_END).strip()}"


class _RepeatedKey(Exception):
    """A YAML mapping names a key twice; PyYAML would silently take the last."""


class _OnceLoader(yaml.SafeLoader):
    """A SafeLoader that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise _RepeatedKey(repr(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceLoader)
    except _RepeatedKey as error:
        raise UserError(f"{path} has the key {error} twice; keep one of them") from None
    except OSError as error:
        raise UserError(
            f"cannot read the configuration file {path}: {error.strerror}; the project's own are in configs/"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `section: {{key: value}}` pairs, not a {type(values).__name__}")
    # A section whose keys are all commented out means its defaults.
    return {key: {} if value is None and key in _SECTIONS else value for key, value in values.items()}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read the argument {override!r}: write section.key=value, e.g. optim.lr=1e-3")
    *parents, leaf = key.split(".")
    _check_key_path([*parents, leaf], where=f"the argument {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"cannot read the value in {override!r}: it is not YAML; quote it for the shell") from None
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"{parent!r} in the configuration file must be a section of keys, not {target!r}")
    section = _SECTIONS[parents[0]] if parents else RunConfig
    if section.model_fields[leaf].annotation is str and not isinstance(value, str | list | dict):
        value = text  # what was typed: 007, 2026-01-31 and no are names here, not what YAML makes of them
    target[leaf] = value


def _check_keys(values: dict[str, Any], *, where: str) -> None:
    for key, value in values.items():
        _check_key_path([str(key)], where=where)
        if isinstance(value, dict):
            for leaf in value:
                _check_key_path([str(key), str(leaf)], where=where)


def _check_key_path(parts: Sequence[str], *, where: str) -> None:
    """Raise UserError, naming the nearest key, unless `parts` is a top-level key, a section or a section's key."""
    key = ".".join(parts)
    known = list(flatten(RunConfig()))
    if key in known or key in _SECTIONS:
        return
    elsewhere = _KNOWN_ELSEWHERE_AS.get(parts[-1].replace("-", "_"))
    nearest = difflib.get_close_matches(key, [*known, *_SECTIONS], n=1, cutoff=0.5)
    same_leaf = [k for k in known if k.rpartition(".")[2] == parts[-1]]
    guesses = [elsewhere] if elsewhere else same_leaf or nearest
    hint = f"did you mean {guesses[0]!r}?" if guesses else "--print-config lists all keys"
    raise UserError(f"unknown configuration key {key!r} in {where}; {hint}")
