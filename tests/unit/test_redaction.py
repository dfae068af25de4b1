"""No secret of a URL is left in what is written, and what is not a secret stays."""

import copy
import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config import config_from_dict, config_to_dict, config_to_yaml, flatten, load_config
from dist_deeplab.config.section import Location
from dist_deeplab.errors import UserError
from dist_deeplab.redaction import redact, redact_all, shown_url

DIGEST = "sha256=" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("train tracking.uri=https://me:s3cret@host/a b", "train tracking.uri=https://me:***@host/a b"),
        ("postgresql+psycopg2://u:p%40ss@db:5432/x", "postgresql+psycopg2://u:***@db:5432/x"),
        ("http://host:5000/#/experiments/1", "http://host:5000/#/experiments/1"),
        ("data.train=https://h/t.json?X-Amz-Signature=abc&n=1", "data.train=https://h/t.json?X-Amz-Signature=***&n=1"),
        ("https://h/t?sig=abc", "https://h/t?sig=***"),
        ("a word that is the password: hunter2", "a word that is the password: ***"),
        ("sqlite:////home/me@work/runs/mlflow.db", "sqlite:////home/me@work/runs/mlflow.db"),
        ("https://me:a/b'c:d@host/x y", "https://me:***@host/x y"),
        ("https://ghp_TOKEN@host/x", "https://***@host/x"),
        (
            "https://h/x?api_key=1&apikey=2&auth=3&access_key=4&n=5",
            "https://h/x?api_key=***&apikey=***&auth=***&access_key=***&n=5",
        ),
        ("https://h/x?AWSAccessKeyId=1&Authorization=2", "https://h/x?AWSAccessKeyId=***&Authorization=***"),
        ("https://h/data@v2/train.json", "https://h/data@v2/train.json"),
        ("https://h/x?page=2&design=3", "https://h/x?page=2&design=3"),
    ],
)
def test_secrets_are_replaced_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text, {"MLFLOW_TRACKING_PASSWORD": "hunter2"}) == redacted


@given(password=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"'), min_size=4))
def test_whatever_letters_a_password_has_none_of_it_is_left(password: str) -> None:
    text = f"failed: https://me:{password}@example.org/train.json (404)"
    assert redact(text, {}) == "failed: https://me:***@example.org/train.json (404)"
    assert shown_url(f"https://me:{password}@example.org/t.json?x=1") == "https://example.org/t.json"


def test_redaction_reaches_every_string_and_leaves_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "7")
    values = {"a": ["x7", 7, None, True], "b": {"c": "http://u:p@h"}}
    assert redact_all(values) == {"a": ["x***", 7, None, True], "b": {"c": "http://u:***@h"}}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:80/t.json?X-Amz-Signature=abc#x", "https://h:80/t.json"),
        (f"https://TOKEN@h/w.pth?k=v#{DIGEST}", f"https://h/w.pth#{DIGEST}"),
        ("sqlite:////home/me@work/runs/mlflow.db", "sqlite:////home/me@work/runs/mlflow.db"),
        ("data/what?is#this.json", "data/what?is#this.json"),
        ("https://[half/a", "https://[half/a"),
    ],
)
def test_a_url_is_shown_without_user_and_query(url: str, shown: str) -> None:
    assert shown_url(url) == shown


# --- in the configuration ---------------------------------------------------------------------------------------------

SECRET = "https://me:S3cret@h/t.json?sig=S3cret"
KEYS = ("data.train", "data.val", "model.init")


def test_a_configuration_opens_the_real_url_and_writes_the_shown_one_everywhere() -> None:
    config = load_config(None, [f"{key}={SECRET}" for key in KEYS])
    assert config.data.train.real == config.data.val.real == config.model.init.real == SECRET
    written = [str(config), repr(config), f"{config.data.train}", "see " + str(config.data.val), config_to_yaml(config)]
    written += [json.dumps(config_to_dict(config)), str(flatten(config)), config.model_dump_json()]
    for text in written:
        assert "S3cret" not in text
        assert "https://h/t.json" in text


def test_a_configuration_that_was_written_is_read_back_without_the_secrets() -> None:
    config = load_config(None, [f"data.train={SECRET}"])
    again = config_from_dict(config_to_dict(config), where="test")
    assert again.data.train.real == "https://h/t.json"


def test_a_location_refuses_to_be_used_as_text_and_survives_copies() -> None:
    location = Location(SECRET)
    with pytest.raises(TypeError):
        os.fspath(location)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        json.dumps(location)
    assert copy.deepcopy(location) == pickle.loads(pickle.dumps(location)) == location == SECRET
    assert location != Location("https://h/t.json")


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:pass/word@host",
        "https://TOKEN@host",
        "https://host/?api_key=1",
        "postgresql://me:p@db/x",
        "postgresql://me@db/x?password=p",
    ],
)
def test_a_store_with_a_secret_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(UserError, match="must not hold a password") as caught:
        load_config(None, [f"tracking.uri={uri}"])
    assert not any(secret in str(caught.value) for secret in ("pass/word", "TOKEN", "=1", "p@", "password=p"))


@pytest.mark.parametrize("uri", ["postgresql+psycopg://me@db/mlflow", "http://host:5000/?a=b", "none", "runs/mlruns"])
def test_a_store_without_one_is_taken(uri: str) -> None:
    assert load_config(None, [f"tracking.uri={uri}"]).tracking.uri.real == uri
