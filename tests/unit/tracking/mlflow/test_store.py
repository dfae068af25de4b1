"""Which addresses a store may have."""

import pytest

from dist_deeplab.errors import UserError
from dist_deeplab.tracking.mlflow.store import require_known_store


@pytest.mark.parametrize(
    "uri", ["none", "runs/mlruns", "http://host:5000", "sqlite:///runs/mlflow.db", "postgresql+psycopg://host/mlflow"]
)
def test_a_store_that_mlflow_knows_is_fine(uri: str) -> None:
    require_known_store(uri)


def test_any_other_is_named_with_what_to_use_and_without_its_password() -> None:
    with pytest.raises(UserError, match=r"^htp://.*no store of the kind 'htp'; use http") as caught:
        require_known_store("htp://me:S3cret@host")
    assert "S3cret" not in str(caught.value)
