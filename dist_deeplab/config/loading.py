"""YAML files and command-line overrides -> RunConfig, and back.

A configuration is made of the defaults, a YAML file that changes some of them, and `section.key=value` overrides, in
this order. An unknown key is an error that names the nearest key.
"""

import logging
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_deeplab.config.grid import split_values
from dist_deeplab.config.keys import AFFECTS, RENAMED, SECTIONS, nearest_key
from dist_deeplab.config.problems import sentence
from dist_deeplab.config.schema import RunConfig
from dist_deeplab.config.section import Location, Section
from dist_deeplab.errors import UserError
from dist_deeplab.packaged import find_recipe, recipe_names

log = logging.getLogger(__name__)

_RENAMED_NOTICE = "the key %s is called %s now; its old name still works"
_YAML_END = "...\n"  # what PyYAML closes a bare scalar with


def load_config(path: str | Path | None, overrides: Iterable[str] = (), *, base: RunConfig | None = None) -> RunConfig:
    """The defaults, changed by the YAML file `path` (None: no file), changed by `section.key=value` strings.

    `path` may also be the name of a packaged recipe, such as voc_resnet101. `base` stands in for a file. Values of
    overrides are YAML: `data.scale_range=[0.5,1.5]`, `data.flip=false`, `model.init=`. A key under its old name is
    taken, with one line of notice.

    Raises:
        UserError: file missing or not YAML; unknown key (the nearest one is named); value of a wrong type or range.
    """
    values = config_to_dict(base) if base else {}
    if path is not None:
        values = _read_yaml(find_recipe(Path(path)))
        _check_keys(values, where=str(path))
        values = _with_new_names(values, where=str(path), notice=True)
    overrides = list(overrides)
    where = "the command line" if path is None else f"{path} (with overrides)" if overrides else str(path)
    try:
        for override in overrides:
            _apply_override(values, override)
        return config_from_dict(values, where=where)
    except UserError as error:
        raise UserError(f"{error}{_sweep_hint(overrides, str(error))}") from None


def config_from_dict(values: dict[str, Any], *, where: str) -> RunConfig:
    """The RunConfig of nested `values`; `where` names their origin in errors.

    Raises:
        UserError: unknown key, or value of a wrong type or range.
    """
    _check_keys(values, where=where)
    values = _with_new_names(values, where=where)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"configuration from {where}: {sentence(error)}") from None


def _sweep_hint(overrides: Iterable[str], error: str) -> str:
    """Continuation of an error about an override whose value is several, separated by commas; empty for others."""
    for override in overrides:
        key, _, text = override.partition("=")
        if key in error and key in AFFECTS and AFFECTS[key].what != "nothing" and len(split_values(text)) > 1:
            return f"; several values are a grid: to train one run per value, give {override!r} to dist-deeplab sweep"
    return ""


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (str, int, float, bool, None, list) that `config_from_dict` takes back."""
    return config.model_dump(mode="json")


def config_to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, each key preceded by its documentation; `load_config` reads it back."""
    lines = []
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            lines.append(f"\n{name}:")
            for key, sub in type(value).model_fields.items():
                lines += [*_comment(sub.description, "  "), f"  {_yaml_line(key, getattr(value, key))}"]
        else:
            lines += [*_comment(field.description), _yaml_line(name, value)]
    return "\n".join(lines) + "\n"


def _comment(text: str | None, indent: str = "") -> list[str]:
    return [f"{indent}# {line.strip()}" for line in (text or "").splitlines()]


def _yaml_line(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Location) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{key}: {text.removesuffix(_YAML_END).strip()}"


class _RepeatedKey(Exception):
    """A YAML mapping names a key twice; PyYAML would silently take the last."""


class _OnceLoader(yaml.SafeLoader):
    """A SafeLoader that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for node_of_key, _ in node.value:
            key = self.construct_object(node_of_key, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it below
            if key in seen:
                raise _RepeatedKey(repr(key))
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceLoader)
    except _RepeatedKey as error:
        raise UserError(f"{path} has the key {error} twice; keep one of them") from None
    except OSError as error:
        raise UserError(
            f"cannot read the configuration file {path}: {error.strerror}; recipes of the package: "
            f"{', '.join(recipe_names())}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `section: {{key: value}}` pairs, not a {type(values).__name__}")
    # A section whose keys are all commented out means its defaults.
    return {key: {} if value is None and key in SECTIONS else value for key, value in values.items()}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals and Path(override).suffix in (".yaml", ".yml"):
        raise UserError(f"a configuration file is named by --config: write --config {override}")
    if not equals or not key:
        raise UserError(f"cannot read the argument {override!r}: write section.key=value, e.g. optim.lr=1e-3")
    if key in RENAMED:
        log.warning(_RENAMED_NOTICE, key, RENAMED[key])
        key = RENAMED[key]
    *parents, leaf = key.split(".")
    _check_key_path([*parents, leaf], where=f"the argument {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        is_text = not any("\ud800" <= letter <= "\udfff" for letter in text)  # how Python marks bytes that are no UTF-8
        remedy = "it is not YAML; quote it for the shell" if is_text else "it is not UTF-8; rename the file"
        raise UserError(f"cannot read the value in {override!r}: {remedy}") from None
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"{parent!r} in the configuration file must be a section of keys, not {target!r}")
    section = SECTIONS[parents[0]] if parents else RunConfig
    if section.model_fields[leaf].annotation in (str, Location) and not isinstance(value, str | list | dict):
        value = text  # what was typed: 007, 2026-01-31 and no are names here, not what YAML makes of them
    target[leaf] = value


def _with_new_names(values: dict[str, Any], *, where: str, notice: bool = False) -> dict[str, Any]:
    """The values under the keys' names of today.

    Raises:
        UserError: a key is given by both of its names, with different values.
    """
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for old, new in RENAMED.items():
        (section, leaf), new_leaf = old.split("."), new.rpartition(".")[2]
        keys = values.get(section)
        if not isinstance(keys, dict) or leaf not in keys:
            continue
        value = keys.pop(leaf)
        if notice:
            log.warning(_RENAMED_NOTICE, old, new)
        if keys.setdefault(new_leaf, value) != value:
            raise UserError(f"{where} gives both {new} and its old name {old}; keep {new}")
    return values


def _check_keys(values: dict[str, Any], *, where: str) -> None:
    for key, value in values.items():
        _check_key_path([str(key)], where=where)
        if isinstance(value, dict):
            for leaf in value:
                _check_key_path([str(key), str(leaf)], where=where)


def _check_key_path(parts: Sequence[str], *, where: str) -> None:
    """Raise UserError, naming the nearest key, unless `parts` is a top-level key, a section or a section's key."""
    key = ".".join(parts)
    if key in AFFECTS or key in SECTIONS or key in RENAMED:
        return
    nearest = nearest_key(key)
    hint = f"did you mean {nearest!r}?" if nearest else "--print-config lists all keys"
    raise UserError(f"unknown configuration key {key!r} in {where}; {hint}")
