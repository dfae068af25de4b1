"""A configuration is typed, frozen, readable back from what it prints, and every mistake in one names its remedy."""

import itertools
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_deeplab.config import (
    AFFECTS,
    CrfConfig,
    RunConfig,
    changed_from_defaults,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    flatten,
    grid_size,
    load_config,
    recipe_differences,
    score_settings,
)
from dist_deeplab.config.section import Affects, Section
from dist_deeplab.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

text = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
name = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,10}\Z")
positive_float = st.floats(min_value=1e-12, max_value=1e6)
configs = st.fixed_dictionaries(
    {},
    optional={
        "name": name,
        "seed": st.integers(0, 2**62),
        "output_dir": text,
        "resume": text.filter(bool),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "train": text,
                "crop_size": st.integers(1, 25).map(lambda k: 32 * k + 1),  # fits every scale below
                "scale_range": st.tuples(positive_float, positive_float).map(sorted),
                "flip": st.booleans(),
            },
        ),
        "batch": st.fixed_dictionaries({}, optional={"micro_size": st.none() | st.integers(1, 64)}),
        "optim": st.fixed_dictionaries({}, optional={"lr": positive_float, "weight_decay": positive_float}),
        "multi_scale": st.fixed_dictionaries({}, optional={"scales": st.sampled_from([[], [1.0, 0.75, 0.5]])}),
        "tracking": st.fixed_dictionaries({}, optional={"uri": text, "experiment": text}),
    },
)


def message_of(*overrides: str, path: Path | None = None) -> str:
    """The message of the error that these arguments are."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value), "a mistake is reported in one line"
    return str(caught.value)


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(values=configs)
def test_the_printed_yaml_reads_back_as_the_same_configuration(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = config_from_dict(values, where="the test")
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@settings(max_examples=60)
@given(values=configs)
def test_plain_values_read_back_as_the_same_configuration(values: dict[str, Any]) -> None:
    config = config_from_dict(values, where="the test")
    plain = config_to_dict(config)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain, "plain values only"
    assert config_from_dict(plain, where="the test") == config


def test_the_printed_yaml_documents_every_key() -> None:
    lines = config_to_yaml(RunConfig()).splitlines()
    documented = [line.split(":")[0].strip() for above, line in itertools.pairwise(lines) if above.strip()[:2] == "# "]
    documented = [key for key in documented if key[:2] != "# "]  # the lines of a longer comment but the last
    assert documented == [key.rpartition(".")[2] for key in flatten(RunConfig())]
    assert "None" not in "".join(line for line in lines if line.strip().startswith("#")), "a key without docstring"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "max_steps: 7\noptim: {lr: 0.5, momentum: 0.25}\n")
    config = load_config(path, ["optim.lr=1e-3", "data.scale_range=[0.75,1]", "data.flip=false", "model.init="])
    assert (config.max_steps, config.optim.momentum) == (7, 0.25)
    assert (config.optim.lr, config.data.scale_range, config.data.flip) == (1e-3, (0.75, 1.0), False)
    assert (config.model.init, config.seed) == ("", RunConfig().seed)


def test_the_last_of_two_overrides_of_a_key_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_config(None, ["tracking.uri=http://host/?a=b"]).tracking.uri == "http://host/?a=b"


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "{}\n"])
def test_an_empty_file_means_the_defaults(content: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, content)) == RunConfig()


def test_a_section_whose_keys_are_all_commented_out_means_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\noptim:\n  # lr: 0.1\n")
    assert load_config(path, ["optim.momentum=0.5"]).optim.momentum == 0.5
    assert load_config(path).optim == RunConfig().optim


def test_a_base_stands_in_for_a_file_and_is_left_alone() -> None:
    base = load_config(None, ["seed=4", "optim.lr=0.5"])
    config = load_config(None, ["optim.lr=0.25"], base=base)
    assert (config.seed, config.optim.lr) == (4, 0.25)
    assert base.optim.lr == 0.5


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_in_the_repository_loads(path: Path) -> None:
    assert load_config(path).max_steps > 0


@pytest.mark.parametrize("value", ["007", "1_000", "2026-01-31", "12:30", "no", "1.50", "0x10"])
def test_a_text_key_takes_what_was_typed(value: str) -> None:
    """YAML 1.1 reads these as 7, 1000, a date, 750, false, 1.5 and 16: a run under a name that nobody gave it."""
    assert load_config(None, [f"tracking.experiment={value}"]).tracking.experiment == value


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_unknown_key_in_a_file_is_named_with_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "optim:\n  momentun: 0.9\n")
    message = message_of(path=path)
    assert "'optim.momentun'" in message
    assert str(path) in message
    assert "'optim.momentum'" in message


@pytest.mark.quick("P6")
@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.moment=0.9", "optim.momentum"),
        ("data.cropsize=321", "data.crop_size"),
        ("max_step=3", "max_steps"),
        ("crop_size=321", "data.crop_size"),
        ("train.lr=0.1", "optim.lr"),
        ("optimizer.lr=0.1", "optim.lr"),
        ("evals={}", "eval"),
    ],
)
def test_an_unknown_key_in_an_override_is_named_with_the_nearest_key(override: str, nearest: str) -> None:
    message = message_of(override)
    assert repr(override) in message
    assert f"did you mean {nearest!r}?" in message


def test_a_key_like_no_other_points_to_the_list_of_keys() -> None:
    assert "--print-config" in message_of("zzzzzz=1")


@pytest.mark.parametrize("content", ["1: 2\n", "data: {3: 4}\n", "data: {train: {deeper: 1}}\n", "seed: {a: 1}\n"])
def test_a_strange_key_in_a_file_is_an_error(content: str, tmp_path: Path) -> None:
    assert message_of(path=write(tmp_path, content))


DRSLEEP = {
    "batch_size": "batch.global_size",
    "data_dir": "data.train",
    "data_list": "data.train",
    "grad_update_every": "batch.micro_size",
    "ignore_label": "data.ignore_label",
    "input_size": "data.crop_size",
    "is_training": "model.batch_norm",
    "learning_rate": "optim.lr",
    "momentum": "optim.momentum",
    "not_restore_last": "model.restore_last",
    "num_classes": "data.num_classes",
    "num_steps": "max_steps",
    "power": "optim.power",
    "random_mirror": "data.flip",
    "random_scale": "data.scale_range",
    "random_seed": "seed",
    "restore_from": "model.init",
    "save_num_images": "eval.num_panels",
    "save_pred_every": "checkpoint.every",
    "snapshot_dir": "output_dir",
    "weight_decay": "optim.weight_decay",
}
"""Every argument of train.py in DrSleep's tensorflow-deeplab-resnet, and what it is called here."""


@pytest.mark.parametrize("theirs", DRSLEEP)
@pytest.mark.parametrize("spelling", ["{}", "optim.{}"])
def test_a_name_from_drsleeps_script_leads_to_ours(theirs: str, spelling: str) -> None:
    key = spelling.format(theirs)
    if key not in flatten(RunConfig()):
        assert f"did you mean {DRSLEEP[theirs]!r}?" in message_of(f"{key}=1")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=fast", "optim.lr", "'fast'"),
        ("max_steps=1.5", "max_steps", "1.5"),
        ("max_steps=many", "max_steps", "'many'"),
        ("data.flip=perhaps", "data.flip", "'perhaps'"),
        ("data.scale_range=1.0", "data.scale_range", "1.0"),
        ("data.scale_range=[1,2,3]", "data.scale_range", "[1, 2, 3]"),
        ("data.train=[a,b]", "data.train", "['a', 'b']"),
        ("output_dir=[a]", "output_dir", "['a']"),
        ("model.backbone=resnet102", "model.backbone", "'resnet102'"),
        ("max_steps=true", "max_steps", "True"),
        ("seed=yes", "seed", "True"),
        ("optim.lr=true", "optim.lr", "True"),
        ("data.scale_range=[true,true]", "data.scale_range", "True"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_key(override: str, key: str, value: str) -> None:
    message = message_of(override)
    assert key in message
    assert value in message


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("seed=-1", "greater than or equal to 0"),
        (f"seed={2**64}", "less than"),
        ("max_steps=0", "greater than or equal to 1"),
        ("optim.lr=0", "greater than 0"),
        ("optim.lr=.nan", "finite"),
        ("optim.lr=.inf", "finite"),
        ("optim.momentum=1", "less than 1"),
        ("optim.clip_norm=-1", "greater than or equal to 0"),
        ("data.num_classes=1", "greater than or equal to 2"),
        ("data.num_classes=256", "less than or equal to 255"),
        ("data.ignore_label=256", "less than or equal to 255"),
        ("data.crop_size=320", "321"),
        ("data.crop_size=1", "33"),
        ("data.crop_size=-5", "greater than or equal to 1"),
        ("data.scale_range=[1.5,0.5]", "0 < low <= high"),
        ("data.scale_range=[0,1]", "0 < low <= high"),
        ("data.scale_range=[.nan,1]", "finite"),
        ("multi_scale.scales=[0.75,0.5]", "1.0"),
        ("multi_scale.scales=[1.0,1.0]", "once"),
        ("multi_scale.scales=[1.0]", "one or more other scales"),
        ("multi_scale.scales=[1.0,1.5]", "less than or equal to 1"),
        ("multi_scale.full_grid=[0.75]", "not among the smaller ones ([]) of multi_scale.scales"),
        ("data.scale_step=0.3", "must divide data.scale_range=[0.5, 1.5] evenly"),
        ("data.scale_step=-1", "greater than or equal to 0"),
        ("model.mean_bgr=[1,2]", "must be [blue, green, red]"),
        ("model.mean_bgr=[1,2,300]", "less than or equal to 255"),
        ("loss.average=classes", "'images'"),
        ("loss.class_weights=[1,-2]", "greater than or equal to 0"),
        ("loss.class_weights=[0,0]", "must have a weight above 0"),
        ("loss.class_weights=rare", "'auto'"),
        ("checkpoint.keep_last=1", "greater than or equal to 2"),
        ("model.backbone=vgg16", "'resnet101'"),
        ("precision.dtype=half", "'bf16'"),
        ("batch.micro_size=0", "greater than or equal to 1 or 'auto'"),
        ("resume=", "must be auto, never or the path of a checkpoint"),
        ("name=../elsewhere", "must hold only letters A-Z and a-z, digits and . _ -"),
        ("name=a/b", "e.g. voc_run-2"),
        ("name=", "begin with a letter or digit"),
        ("tracking.register_as=a/b", "must not hold / or :"),
        ("tracking.register_as=a:b", "e.g. voc-deeplab"),
        ("max_steps=1e4", "must be a whole number, in digits"),
        ("multi_scale.scales=0.5", "must be a list, e.g. [0.5, 1.0]"),
        ("data.scale_range=[1,2,3]", "must have at most 2 values, not 3"),
        ("data.scale_range=[1]", "data.scale_range.1 = [1]: a value is missing"),
        ("eval=3", "must be a section of keys"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_would_be_right(override: str, remedy: str) -> None:
    message = message_of(override)
    assert override.partition("=")[0] in message
    assert remedy in message
    for word in ("Input", "String", "pattern", "Tuple", "instance", "constrained", "validation"):
        assert word not in message, "a word of pydantic's"


def test_auto_takes_what_was_chosen_before_and_is_no_change_of_the_recipe() -> None:
    chosen, asked = (load_config(None, [f"precision.dtype={dtype}"]) for dtype in ("bf16", "auto"))
    assert recipe_differences(chosen, asked) == []
    assert recipe_differences(asked, chosen) == ["precision.dtype: auto -> bf16"]


@pytest.mark.parametrize("override", ["loss.class_weights=[1,-2]", "loss.class_weights=[a,2]"])
def test_a_wrong_value_in_a_list_is_not_told_to_be_one_of_the_words_instead_of_the_list(override: str) -> None:
    message = message_of(override)
    assert re.search(r"loss\.class_weights\.[01] = \S+: must be", message)
    assert "'auto'" not in message


@given(
    crop=st.integers(4, 100).map(lambda k: 8 * k + 1),
    scales=st.sampled_from([[1.0, 0.75, 0.5], [1.0, 0.5], [1.0, 0.75], [1.0, 0.25], [0.125, 1.0]]),
)
def test_a_crop_must_stay_on_the_grid_at_every_scale_or_a_size_that_does_is_named(
    crop: int, scales: list[float]
) -> None:
    def fits(size: int) -> bool:
        return all((size - 1) * Fraction(scale) % 8 == 0 for scale in scales)

    overrides = f"data.crop_size={crop}", f"multi_scale.scales={scales}"
    if fits(crop):
        assert load_config(None, overrides).data.crop_size == crop
    else:
        message = message_of(*overrides)
        assert f"data.crop_size={crop}" in message
        remedy = int(message.rpartition("data.crop_size=")[2])
        assert fits(remedy)
        assert load_config(None, [f"data.crop_size={remedy}", overrides[1]])


@pytest.mark.quick("P6")
def test_all_wrong_values_are_reported_at_once() -> None:
    message = message_of("optim.lr=0", "max_steps=0", "data.crop_size=8")
    assert all(key in message for key in ("optim.lr", "max_steps", "data.crop_size"))


def test_a_wrong_value_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: -1}\n")
    message = message_of(path=path)
    assert str(path) in message
    assert "optim.lr = -1" in message


@pytest.mark.parametrize("value", ["3", "text", "[1, 2]", "true"])
def test_a_section_given_something_else_is_named(value: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"data: {value}\n")
    for message in (message_of(path=path), message_of("data.train=x", path=path), message_of(f"data={value}")):
        assert "data" in message
        assert str(yaml.safe_load(value)) in message


@pytest.mark.parametrize("override", ["fast", "=3", "", "optim.lr"])
def test_an_argument_that_is_not_a_key_and_value_says_how_to_write_one(override: str) -> None:
    message = message_of(override)
    assert repr(override) in message
    assert "section.key=value" in message


@pytest.mark.parametrize("override", ["data.scale_range=[0.5", "name='a", "name=a: b: c", "name=@x"])
def test_a_value_that_is_not_yaml_is_named(override: str) -> None:
    message = message_of(override)
    assert repr(override) in message
    assert "YAML" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = message_of(path=tmp_path / "absent.yaml")
    assert str(tmp_path / "absent.yaml") in message
    assert "voc_resnet101" in message


def test_a_folder_instead_of_a_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in message_of(path=tmp_path)


@pytest.mark.parametrize(
    "content", [b"data: [1,\n", b"a: b: c\n", b"\xff\xfe\x00", b"x: !!python/object:os.system {}\n"]
)
def test_a_file_that_is_not_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = message_of(path=path)
    assert str(path) in message
    assert "YAML" in message


@pytest.mark.parametrize(("content", "kind"), [("- 1\n- 2\n", "list"), ("just words\n", "str"), ("7\n", "int")])
def test_a_file_without_keys_says_what_it_must_hold(content: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    message = message_of(path=path)
    assert str(path) in message
    assert "section" in message
    assert kind in message


@pytest.mark.parametrize("content", ["seed: 1\nseed: 2\n", "optim: {lr: 0.1}\nseed: 1\noptim: {momentum: 0.5}\n"])
def test_a_key_written_twice_in_a_file_is_an_error(content: str, tmp_path: Path) -> None:
    """YAML keeps the last one: a whole section written further up would be dropped without a word."""
    assert content.partition(":")[0] in message_of(path=write(tmp_path, content))


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_configuration_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0


OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "seed": 1,
    "max_steps": 5,
    "output_dir": "elsewhere",
    "resume": "never",
    "resume_anyway": True,
    "device": "cpu",
    "deterministic": True,
    "max_hours": 2.5,
    "data.train": "x.json",
    "data.val": "x.json",
    "data.num_classes": 5,
    "data.ignore_label": 0,
    "data.scale_range": [0.5, 1.0],
    "data.scale_step": 0.25,
    "data.photometric": True,
    "data.flip": False,
    "data.crop_size": 33,
    "data.num_workers": 1,
    "data.access": "stream",
    "data.shuffle": "blocks",
    "data.window_shards": 2,
    "data.canonical_groups": 8,
    "data.repeat_threshold": 0.1,
    "data.cache_dir": "/tmp/shards",
    "data.cache_gib": 1.5,
    "data.max_bad_samples": 3,
    "model.backbone": "resnet50",
    "model.batch_norm": "frozen",
    "model.sync_bn": "torch",
    "model.init": "x.pt",
    "model.restore_last": False,
    "model.train_only": "head",
    "model.mean_bgr": [104.0, 117.0, 123.0],
    "batch.global_size": 12,
    "batch.micro_size": 2,
    "optim.lr": 1.0,
    "optim.momentum": 0.0,
    "optim.weight_decay": 0.0,
    "optim.power": 1.0,
    "optim.warmup_steps": 1,
    "optim.clip_norm": 1.0,
    "multi_scale.scales": [1.0, 0.5],
    "multi_scale.full_grid": [0.5],
    "loss.average": "images",
    "loss.class_weights": [1.0, 2.0],
    "precision.dtype": "bf16",
    "speed.channels_last": False,
    "speed.cudnn_benchmark": False,
    "speed.compile": True,
    "speed.recompute": True,
    "speed.compress_gradients": True,
    "speed.static_graph": True,
    "speed.cuda_graph": True,
    "precision.max_nonfinite_steps": 3,
    "precision.backend": "apex",
    "optim.implementation": "apex",
    "eval.every": 1,
    "eval.num_panels": 1,
    "eval.table": "mean",
    "eval.batch_size": 1,
    "eval.scales": [0.5, 1.0],
    "eval.fusion": "mean",
    "eval.flip": True,
    "eval.align_corners": False,
    "eval.window": 1025,
    "eval.overlap": 128,
    "eval.crf": True,
    "crf.iterations": 5,
    "crf.pos_w": 1.0,
    "crf.pos_xy_std": 2.0,
    "crf.bi_w": 1.0,
    "crf.bi_xy_std": 50.0,
    "crf.bi_rgb_std": 5.0,
    "crf.num_workers": 2,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 9,
    "checkpoint.keep_every": 7,
    "distributed.startup_timeout_s": 7.0,
    "distributed.hang_timeout_s": 7.0,
    "tracking.uri": "none",
    "tracking.experiment": "x",
    "tracking.log_every": 1,
    "tracking.system_metrics": True,
    "tracking.log_model": True,
    "tracking.register_as": "x",
    "tracking.parent": "../sweep",
    "tracking.on_event": "echo",
}
MAY_CHANGE = {
    *("name", "output_dir", "resume", "resume_anyway", "max_hours", "data.train", "data.val", "data.num_workers"),
    *("data.cache_dir", "data.cache_gib", "data.max_bad_samples"),
    *("model.sync_bn", "model.init", "model.restore_last", "batch.micro_size", "eval.every", "eval.num_panels"),
    *("eval.batch_size", "eval.scales", "eval.fusion", "eval.flip", "eval.align_corners", "eval.crf"),
    *("eval.window", "eval.overlap"),
    *("crf.iterations", "crf.pos_w", "crf.pos_xy_std", "crf.bi_w", "crf.bi_xy_std", "crf.bi_rgb_std"),
    *("crf.num_workers", "eval.table"),
    *("speed.channels_last", "speed.cudnn_benchmark", "speed.compile", "speed.recompute", "speed.static_graph"),
    "speed.cuda_graph",
    *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every"),
    *("distributed.startup_timeout_s", "distributed.hang_timeout_s"),
    *("tracking.uri", "tracking.experiment", "tracking.log_every"),
    *("tracking.system_metrics", "tracking.log_model", "tracking.register_as", "tracking.parent", "tracking.on_event"),
    *("device", "deterministic", "optim.implementation", "precision.max_nonfinite_steps"),
}
"""What a resumed run may change: nothing here alters what an optimizer step computes from a given state and data."""


def test_the_table_of_changes_covers_every_key() -> None:
    assert set(flatten(RunConfig())) <= set(OTHER_VALUES), "a new key: say here whether a resumed run may change it"


@pytest.mark.parametrize("key", flatten(RunConfig()))
def test_a_resumed_run_may_change_what_does_not_alter_the_recipe_and_nothing_else(key: str) -> None:
    saved = RunConfig()
    required = {
        "precision.backend": ["precision.dtype=fp16"],
        "multi_scale.full_grid": ["multi_scale.scales=[1.0,0.5]"],
    }
    needed = required.get(key, [])
    saved = load_config(None, needed)
    current = load_config(None, [*needed, f"{key}={yaml.safe_dump(OTHER_VALUES[key], default_flow_style=True)}"])
    assert current != saved
    expected = [] if key in MAY_CHANGE else [f"{key}: {flatten(saved)[key]} -> {OTHER_VALUES[key]}"]
    assert recipe_differences(saved, current) == expected


def test_every_key_says_what_it_affects() -> None:
    """A key without a mark stops the import of `config.keys`; this names it."""
    sections = {"": RunConfig, **{f"{name}.": type(value) for name, value in RunConfig() if isinstance(value, Section)}}
    unmarked = [
        prefix + name
        for prefix, section in sections.items()
        for name, field in section.model_fields.items()
        if f"{prefix}{name}." not in sections and not any(isinstance(mark, Affects) for mark in field.metadata)
    ]
    assert unmarked == []
    assert list(AFFECTS) == list(flatten(RunConfig()))


def test_a_score_depends_on_the_crf_s_settings_only_where_it_is_on() -> None:
    plain = score_settings(load_config(None, ["eval.every=7", "eval.batch_size=2", "crf.bi_w=5"]))
    assert set(plain) == {
        "eval.scales",
        "eval.fusion",
        "eval.flip",
        "eval.align_corners",
        "eval.window",
        "eval.overlap",
        "eval.crf",
    }
    refined = score_settings(load_config(None, ["eval.crf=true", "crf.bi_w=5", "crf.num_workers=3"]))
    assert refined["crf.bi_w"] == 5
    assert set(refined) - set(plain) == {f"crf.{name}" for name in CrfConfig.model_fields if name != "num_workers"}


@pytest.mark.parametrize("where", ["file", "command line"])
def test_an_old_name_of_a_key_is_taken_with_one_line_of_notice(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "data: {mirror: false}\n") if where == "file" else None
    config = load_config(path, ["data.mirror=false"] if path is None else [])
    assert config.data.flip is False
    assert caplog.messages == ["the key data.mirror is called data.flip now; its old name still works"]


def test_an_override_under_either_name_wins_over_the_file(tmp_path: Path) -> None:
    for there, here in (("mirror", "flip"), ("flip", "mirror")):
        path = write(tmp_path, f"data: {{{there}: true}}\n")
        assert load_config(path, [f"data.{here}=false"]).data.flip is False


def test_two_names_of_one_key_with_different_values_are_refused(tmp_path: Path) -> None:
    assert "keep data.flip" in message_of(path=write(tmp_path, "data: {mirror: true, flip: false}\n"))


def test_a_checkpoint_s_configuration_under_old_names_is_read_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert config_from_dict({"data": {"mirror": False}}, where="the checkpoint").data.flip is False
    assert caplog.messages == []


def test_a_recipe_does_not_differ_from_itself() -> None:
    config = load_config(None, ["multi_scale.scales=[1.0,0.5]", "data.scale_range=[0.75,1.25]"])
    assert recipe_differences(config, config) == []


@given(value=st.integers(-100, 10_000))
def test_grid_size_is_the_nearest_size_on_the_grid(value: int) -> None:
    distance = min(abs(size - value) for size in range(33, 10_100, 8))
    assert grid_size(value) in range(33, 10_100, 8)
    assert abs(grid_size(value) - value) == distance


def test_the_run_folder_is_the_name_under_the_output_folder() -> None:
    assert load_config(None, ["output_dir=here", "name=a"]).run_dir == Path("here/a")


def test_multi_scale_crops_must_stay_on_the_grid_at_every_scale() -> None:
    assert load_config(None, ["multi_scale.scales=[1.0, 0.75, 0.5]"]).data.crop_size == 321
    with pytest.raises(UserError, match=r"data\.crop_size=329 .* use data\.crop_size=321$"):
        load_config(None, ["multi_scale.scales=[1.0, 0.75, 0.5]", "data.crop_size=329"])


@pytest.mark.parametrize("uri", ["https://me:s3cret@host/mlflow", "postgresql://me:s3cret@db:5432/mlflow"])
def test_a_password_in_the_store_s_uri_is_refused_without_being_printed(uri: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as error:
        load_config(None, [f"tracking.uri={uri}"])
    assert "s3cret" not in str(error.value)
    assert load_config(None, ["tracking.uri=https://host:5000/"]).tracking.uri == "https://host:5000/"


def test_changes_from_the_defaults_are_those_that_matter_to_the_result() -> None:
    config = load_config(None, ["optim.power=1.0", "name=x", "tracking.uri=none", "multi_scale.scales=[1.0,0.5]"])
    assert changed_from_defaults(config) == {"optim.power": 1.0, "multi_scale.scales": [1.0, 0.5]}
    assert changed_from_defaults(RunConfig()) == {}


@pytest.mark.parametrize(
    "override", ["optim.power=0.5,0.9", "seed=0,1", "multi_scale.scales=[],[1.0,0.5]", "max_steps=1, 2"]
)
def test_several_values_of_a_key_name_the_sweep(override: str) -> None:
    with pytest.raises(UserError, match=r"several values are a grid: .* to dist-deeplab sweep") as caught:
        load_config(None, ["optim.lr=0.1", override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize("override", ["optim.power=fast", "data.scale_range=[1,2,3]", "optim.pover=1"])
def test_other_wrong_values_do_not(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["model.init=a,b.pth", override])
    assert "grid" not in str(caught.value)
