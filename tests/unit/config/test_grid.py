"""Commas between values make a grid; commas inside brackets and quotes do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config.grid import expand, split_values
from dist_deeplab.errors import UserError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.9", ["0.9"]),
        ("0.8,0.9,1.0", ["0.8", "0.9", "1.0"]),
        ("[1.0,0.5]", ["[1.0,0.5]"]),
        ("[],[1.0, 0.5]", ["[]", "[1.0, 0.5]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('["a,]",b],c', ['["a,]",b]', "c"]),
        ("it's,b", ["it's", "b"]),
        ("", [""]),
        (",x.pth", ["", "x.pth"]),
        ("{a: [1,2]},3", ["{a: [1,2]}", "3"]),
    ],
)
def test_values_are_separated_by_commas_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@given(text=st.text(alphabet="ab,[]'\" 1.", max_size=20))
def test_nothing_of_the_text_is_lost(text: str) -> None:
    assert ",".join(split_values(text)) == text


def test_a_grid_is_every_value_of_one_key_with_every_value_of_the_other() -> None:
    fixed, runs = expand(["name=poly", "optim.power=0.8,1.0", "max_steps=9", "optim.lr=1e-3,2e-3"])
    assert fixed == ["name=poly", "max_steps=9"]
    assert {run.suffix: run.overrides for run in runs} == {
        "power_0.8-lr_1e-3": ("optim.power=0.8", "optim.lr=1e-3"),
        "power_0.8-lr_2e-3": ("optim.power=0.8", "optim.lr=2e-3"),
        "power_1.0-lr_1e-3": ("optim.power=1.0", "optim.lr=1e-3"),
        "power_1.0-lr_2e-3": ("optim.power=1.0", "optim.lr=2e-3"),
    }


def test_names_hold_only_what_a_run_s_name_may_and_are_all_different() -> None:
    _, runs = expand(["multi_scale.scales=[],[1.0,0.5],[1.0, 0.75]", "model.init=,a/b.pth,a_b.pth"])
    assert [run.suffix for run in runs][:4] == [
        "scales_none-init_none",
        "scales_none-init_a_b.pth-1",
        "scales_none-init_a_b.pth-2",
        "scales_1.0_0.5-init_none",
    ]
    assert len({run.suffix for run in runs}) == 9


def test_a_name_tells_the_value_and_is_no_longer_than_a_folder_s() -> None:
    _, runs = expand(["optim.lr=.1,-.5,1,[.5]", f"model.init=/{'x' * 300}/a.pth,b.pth"])
    assert [run.suffix.partition("-init_")[0] for run in runs[1::2]] == ["lr_0.1", "lr_-0.5", "lr_1", "lr_0.5"]
    assert runs[0].suffix.endswith("xx_a.pth")
    assert max(len(run.suffix) for run in runs) < 90


def test_keys_of_one_last_word_are_told_apart() -> None:
    _, runs = expand(["eval.every=1,2", "checkpoint.every=3,4"])
    assert runs[0].suffix == "eval.every_1-checkpoint.every_3"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optim.lr=1"], "no grid"),
        (["optim.lr=1,2,1"], "'1' twice"),
        (["name=a,b"], "name cannot be part of a grid"),
        (["tracking.uri=a,b"], "tracking.uri cannot be part of a grid"),
        (["optim.lr=1,2", "optim.lr=3,4"], "optim.lr is given twice"),
        (["seed=" + ",".join(map(str, range(1001)))], "1001 runs"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        expand(arguments)
