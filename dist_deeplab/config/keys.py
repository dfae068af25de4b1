"""The keys of a configuration one by one, what each affects, and how two configurations differ."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from dist_deeplab.config.schema import RunConfig
from dist_deeplab.config.section import Affects, Section

SECTIONS: dict[str, type[Section]] = {name: type(value) for name, value in RunConfig() if isinstance(value, Section)}

RENAMED = {"data.mirror": "data.flip"}
"""Old names of keys, which files, command lines and checkpoints may still have."""

KNOWN_ELSEWHERE_AS = {
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
    "random_mirror": "data.flip",
    "random_scale": "data.scale_range",
    "random_seed": "seed",
    "init_model": "model.init",
    "load_from": "model.init",
    "pretrained": "model.init",
    "restore_from": "model.init",
    "save_num_images": "eval.num_panels",
    "save_pred_every": "checkpoint.every",
    "snapshot_dir": "output_dir",
}
"""Names of the same settings in DrSleep's and others' scripts, for the hint in an error."""


def _marked_keys() -> Iterator[tuple[str, Affects]]:
    """`section.key` and its mark, in the order of definition.

    Raises:
        StopIteration: as RuntimeError, where a key has no mark.
    """
    sections: dict[str, type[Section]] = {"": RunConfig, **{f"{name}.": section for name, section in SECTIONS.items()}}
    for prefix, section in sections.items():
        for name, field in section.model_fields.items():
            if name not in SECTIONS or prefix:
                yield prefix + name, next(mark for mark in field.metadata if isinstance(mark, Affects))


AFFECTS: Mapping[str, Affects] = dict(_marked_keys())
"""What each key affects: {"section.key": its mark in the schema}."""


def flatten(config: RunConfig) -> dict[str, Any]:
    """{"section.key": plain value} in the order of definition."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def recipe_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every key of the recipe, which decides what a run computes, that differs.

    A new value of `auto` takes what was chosen before.
    """
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if AFFECTS[key].what == "recipe" and after[key] not in (before[key], "auto")
    ]


def changed_from_defaults(config: RunConfig) -> dict[str, Any]:
    """{"section.key": value} of what a run computes with and where it differs from the defaults."""
    defaults = flatten(RunConfig())
    return {
        key: value
        for key, value in flatten(config).items()
        if AFFECTS[key].what != "nothing" and value != defaults[key]
    }


def score_settings(config: RunConfig) -> dict[str, Any]:
    """{"section.key": value} of all that an image's score depends on beside the weights; the CRF's keys if it is on."""
    return {
        key: value
        for key, value in flatten(config).items()
        if AFFECTS[key].what == "score" and (config.eval.crf or not key.startswith("crf."))
    }


def nearest_key(key: str) -> str | None:
    """The key or section that somebody who wrote `key` may have meant, by other programs' names, leaf or spelling."""
    leaf = key.rpartition(".")[2]
    if known := KNOWN_ELSEWHERE_AS.get(leaf.replace("-", "_")):
        return known
    same_leaf = [known for known in AFFECTS if known.rpartition(".")[2] == leaf]
    return next(iter(same_leaf or difflib.get_close_matches(key, [*AFFECTS, *SECTIONS], n=1, cutoff=0.5)), None)
