"""Commands, recipes and scripts are found by the same names from a clone and from an installed package."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dist_deeplab import __main__ as entry
from dist_deeplab import packaged
from dist_deeplab.command_line import VARIABLE, command_name
from dist_deeplab.commands import quickstart, scripts
from dist_deeplab.config import load_config
from dist_deeplab.errors import UserError

REPO = Path(__file__).parents[2]
THIN_SCRIPTS = {
    "make_shards": "shards",
    "make_sample_voc": "sample-voc",
    "prepare_voc": "prepare-voc",
    "convert_weights": "convert-weights",
    "export": "export",
    "score_predictions": "score",
    "sync_mlflow": "sync-mlflow",
    "tune_crf": "tune-crf",
}


def run_entry(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dist-deeplab", *arguments])
    return entry.main()


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_a_manual_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_entry(monkeypatch, name, "--help")
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    assert name == "torchrun" or usage.startswith(f"usage: dist-deeplab {name}")


def test_the_list_of_commands_names_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(monkeypatch) == 2
    capsys.readouterr()
    assert run_entry(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in entry.COMMANDS)


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_entry(monkeypatch, "shrads") == 2
    assert capsys.readouterr().err == "error: there is no command 'shrads'; did you mean shards?\n"


@pytest.mark.parametrize(("script", "name"), THIN_SCRIPTS.items())
def test_a_script_of_tools_is_the_command(script: str, name: str) -> None:
    module = importlib.import_module(f"dist_deeplab.{entry.COMMANDS[name].module}")
    assert runpy.run_path(str(REPO / "tools" / f"{script}.py"))["main"] is module.main


# --- names in messages ------------------------------------------------------------------------------------------------


def test_a_message_names_the_command_that_the_users_shell_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert command_name("shards") == "python -m dist_deeplab shards"
    for path in (tmp_path / "dist-deeplab", tmp_path / "elsewhere" / "dist-deeplab"):
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o755)
    assert command_name("shards") == "dist-deeplab shards"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere" / "dist-deeplab"))
    assert command_name("shards") == f"{tmp_path}/elsewhere/dist-deeplab shards"


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", packaged.recipe_names())
def test_a_packaged_recipe_is_found_by_its_name_from_any_folder(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_config(REPO / "configs" / f"{recipe}.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(recipe) == load_config(f"{recipe}.yaml") == load_config(f"configs/{recipe}.yaml") == expected
    (tmp_path / recipe).write_text("name: mine\n")
    assert load_config(recipe).name == "mine", "a file of the user's goes before"


def test_a_recipe_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(UserError, match=r"voc_resnet102.*quickstart, voc_resnet101, .*voc_resnet101_msc"):
        load_config("voc_resnet102")


def test_a_bare_path_of_a_configuration_names_the_option() -> None:
    with pytest.raises(UserError, match=r"write --config configs/quickstart\.yaml"):
        load_config(None, ["configs/quickstart.yaml"])


# --- scripts and quickstart -------------------------------------------------------------------------------------------


def test_the_scripts_are_written_with_the_environment_that_has_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts.main([str(tmp_path)]) == 0
    assert (tmp_path / "launch" / "environment").read_text() == f"{sys.prefix}\n"
    assert (tmp_path / "slurm/train.sh").read_text() == (REPO / "slurm/train.sh").read_text()
    assert not (tmp_path / "launch/test.sh").exists()
    assert os.access(tmp_path / "slurm/train.sh", os.X_OK)
    done = subprocess.run([tmp_path / "launch/sweep.sh", "--help"], capture_output=True, text=True, check=True)
    assert "./launch/sweep.sh" in done.stdout
    capsys.readouterr()
    (tmp_path / "slurm/train.sh").write_text("mine")
    assert scripts.main([str(tmp_path)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("replaced")] == [
        f"replaced: {tmp_path}/slurm/train.sh"
    ]


def test_a_clone_is_not_overwritten_by_its_own_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts.main([str(REPO)]) == 2
    assert "has these scripts already" in capsys.readouterr().err
    assert not (REPO / "launch" / "environment").exists()


def test_quickstart_skips_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [part[0] for part in quickstart.commands(2, [])] == ["sample-voc", "shards", "torchrun", "evaluate"]
    folder = tmp_path / "data/sample_voc/shards"
    folder.mkdir(parents=True)
    (folder / "train.json").touch()
    assert "train" not in quickstart.commands(2, [])[1]
    (folder / "val.json").touch()
    first, training, evaluation = quickstart.commands(2, ["max_steps=4"])
    assert first[0] == "sample-voc"
    assert training[-4:] == ["dist_deeplab.train", "--config", "quickstart", "max_steps=4"]
    assert "runs/quickstart/checkpoints/best.pt" in evaluation


def test_quickstart_refuses_what_its_evaluation_would_not_find(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["name=mine"])
    assert "name=mine cannot be changed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["max_step=3"], "did you mean 'max_steps'?"),
        (["optim.lr=fast"], "optim.lr = 'fast': must be a number"),
        (["data.crop_size=130"], "data.crop_size = 130: must be 8k+1"),
        (["max_steps"], "write section.key=value"),
        (["--nproc-per-node", "9"], "too few images for 9 processes"),
        (["--nproc-per-node", "4", "batch.global_size=3"], "batch.global_size=3 is too few images for 4 processes"),
        (["batch.global_size=1"], "too few images for"),
    ],
)
def test_quickstart_refuses_what_training_would_before_it_draws_data(
    mistake: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "default_processes", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(mistake)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_that_shows_runs_exists_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged.mlflow_ui("sqlite:///runs/mlflow.db") == "./launch/mlflow_ui.sh"
    monkeypatch.setattr(packaged, "PACKAGE", tmp_path)
    (tmp_path / "launch").mkdir()
    assert (
        packaged.mlflow_ui("sqlite:///runs/mlflow.db") == "mlflow server --backend-store-uri sqlite:///runs/mlflow.db"
    )
