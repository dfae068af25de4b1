"""What log_model refuses before MLflow is asked; tests/tracking logs models to a real server."""

from pathlib import Path

import pytest

from dist_deeplab.log_model import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "is not a run's folder: it has no run.json"),
        (
            ["--register-as", "a/b"],
            "configuration from --register-as: tracking.register_as = 'a/b': must not hold / or :",
        ),
        (["--uri", "ftp://host"], "ftp://host: MLflow knows no store of the kind 'ftp'"),
    ],
)
def test_what_cannot_be_logged_is_refused_in_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_a_run_that_is_not_in_mlflow_yet_says_how_to_send_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert f"sync-mlflow {tmp_path}" in capsys.readouterr().err
