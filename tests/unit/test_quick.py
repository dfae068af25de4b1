"""`./launch/test.sh --quick` has a test for every promise that tests/README.md lists."""

import re

from tests.conftest import REPO


def test_every_promise_has_a_quick_test() -> None:
    listed = re.findall(r"^\| (P\d+) \|", (REPO / "tests/README.md").read_text(), flags=re.MULTILINE)
    sources = (path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    marked = {promise for text in sources for promise in re.findall(r"pytest\.mark\.quick\(\"(P\d+)\"\)", text)}
    assert listed == [f"P{number}" for number in range(1, 11)]
    assert marked == set(listed)
