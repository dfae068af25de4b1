"""Each reader of foreign bytes, on its corpus and on a few hundred mutations of it: in seconds, without atheris."""

from collections.abc import Callable

import pytest

from tests.fuzz.harness import CORPUS, OutOfBoundsError, Target, all_targets, check, mutations

TARGETS = all_targets()
NUM_MUTATIONS = 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_any_bytes_are_read_or_refused_in_one_sentence(target: Target) -> None:
    for seed in target.seeds():
        assert check(target, seed), "a seed is refused: mutations of it would test little"
    corpus = target.corpus()
    for data in [b"", *corpus, *mutations(corpus, NUM_MUTATIONS, seed=7)]:
        try:
            check(target, data)
        except Exception as error:
            raise AssertionError(f"{target.name} on {len(data)} bytes {data[:2000]!r}") from error


def test_each_folder_of_the_corpus_belongs_to_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir() if folder.is_dir()} <= {target.name for target in TARGETS}


def _reads_forever(data: bytes) -> None:
    while True:
        pass


def _takes_memory(data: bytes) -> None:
    bytearray(2**29)[:] = b"1" * 2**29


def _raises(data: bytes) -> None:
    raise KeyError("a")


@pytest.mark.parametrize("read", [_reads_forever, _takes_memory])
def test_the_harness_notices_time_and_memory(read: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness.MAX_CPU_S", 0.2)
    with pytest.raises(OutOfBoundsError):
        check(Target("sample", read, list), b"")


def test_the_harness_passes_other_errors_on() -> None:
    with pytest.raises(KeyError):
        check(Target("sample", _raises, list), b"")
