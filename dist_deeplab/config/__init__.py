"""`RunConfig`: everything that defines a run, typed, frozen and checked; and how it is read and written."""

from dist_deeplab.config.keys import (
    AFFECTS,
    RENAMED,
    changed_from_defaults,
    flatten,
    recipe_differences,
    score_settings,
)
from dist_deeplab.config.loading import config_from_dict, config_to_dict, config_to_yaml, load_config
from dist_deeplab.config.results import CrfConfig, EvalConfig
from dist_deeplab.config.schema import RunConfig
from dist_deeplab.config.training import DataConfig, OptimConfig, grid_size

__all__ = [
    "AFFECTS",
    "RENAMED",
    "CrfConfig",
    "DataConfig",
    "EvalConfig",
    "OptimConfig",
    "RunConfig",
    "changed_from_defaults",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "flatten",
    "grid_size",
    "load_config",
    "recipe_differences",
    "score_settings",
]
