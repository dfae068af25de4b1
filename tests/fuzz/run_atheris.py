"""Coverage-guided fuzzing of the readers of foreign bytes.

    python tests/fuzz/run_atheris.py --seconds 60                      # each target for a minute, new inputs each time
    python tests/fuzz/run_atheris.py weights_npy manifest --seconds 600 --corpus ~/fuzz_corpus
    python tests/fuzz/run_atheris.py --runs 1000 --seed 1              # the same inputs each time, as in .ci/run

Needs `pip install atheris` (Linux). The readers are imported once; each target runs in a fork of that process, as many
at a time as there are cores. An input that breaks a reader is kept as tests/fuzz/corpus/<target>/crash-<SHA-1>, where
the tests find it from then on. Exit code: 1 if there is one.
"""

import argparse
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

INSTRUMENTED = ["dist_deeplab", "pickle", "zipfile", "tarfile", "json", "yaml", "numpy.lib", "safetensors"]
MAX_INPUT = 2**17
LIMITS = ["-timeout=30", "-reload=0", "-rss_limit_mb=4096", f"-max_len={MAX_INPUT}"]
DEFAULT_SECONDS = 60
MAX_SECONDS_OF_RUNS = 600  # per target: a thousand inputs take a second or two
ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
DONE = re.compile(r"#(\d+)\s+DONE +(.*?) lim:")  # libFuzzer's last line: inputs, lines and features reached, corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=int, help=f"per target (default: {DEFAULT_SECONDS}, without --runs)")
    limit.add_argument("--runs", type=int, help="inputs per target")
    parser.add_argument("--seed", type=int, default=0, help="what the inputs depend on (default: other ones each time)")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found to reach new code")
    arguments = parser.parse_args()
    if any(number is not None and number < 1 for number in (arguments.seconds, arguments.runs)):
        parser.error("--seconds and --runs must be 1 or more")
    if arguments.seed and os.environ.get("PYTHONHASHSEED") != "0":
        start_again_alike()
    seconds = arguments.seconds or (MAX_SECONDS_OF_RUNS if arguments.runs else DEFAULT_SECONDS)
    options = [f"-max_total_time={seconds}", f"-runs={arguments.runs or -1}", f"-seed={arguments.seed}", *LIMITS]
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.harness import all_targets

        names = [target.name for target in all_targets()]  # imports the readers
    unknown = set(arguments.targets) - set(names)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}; those known are {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="fuzz_corpus_") as temporary:
        ended = run_all(arguments.targets or names, options, arguments.corpus or Path(temporary))
        broken = [name for name, exit_code, output in ended if not is_sound(name, exit_code, output)]
    return 1 if broken else 0


def start_again_alike() -> None:
    """Start this program again without what makes two runs differ: seeds of hashes, and addresses in memory.

    libFuzzer keeps values that were compared in a table by address, and inserts them into inputs.
    """
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)  # refused in some containers: then runs differ a little
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})


def run_all(names: Sequence[str], options: Sequence[str], corpus: Path) -> Iterator[tuple[str, int, str]]:
    """Fuzz each target in a process of its own; yield its name, exit code and output, in the order of their ends."""
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name, output = waiting.pop(), tempfile.TemporaryFile()  # noqa: SIM115, closed when it has ended
            pid = os.fork()
            if not pid:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                fuzz(name, options, corpus / name)
            running[pid] = name, output
        pid, status = os.wait()
        name, output = running.pop(pid)
        with output:
            output.seek(0)
            yield name, os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


def is_sound(name: str, exit_code: int, output: str) -> bool:
    """Whether nothing was found, which is printed with what was reached."""
    if exit_code:
        print(output)
    reached = DONE.search(output)
    print(
        f"{name}: {'BROKEN' if exit_code else 'nothing found'}",
        f"in {reached[1]} inputs ({reached[2]})" if reached else "",
        flush=True,
    )
    return exit_code == 0


def fuzz(name: str, options: Sequence[str], folder: Path) -> None:
    """Run one target in this process, which ends here: by libFuzzer, or with exit code 1."""
    try:
        import atheris

        from tests.fuzz.harness import CORPUS, all_targets, check

        target = next(target for target in all_targets() if target.name == name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(target.corpus()):
            (folder / f"seed_{number}").write_bytes(data)
        crashes = CORPUS / name
        crashes.mkdir(parents=True, exist_ok=True)
        arguments = [sys.argv[0], *options, f"-artifact_prefix={crashes}/", str(folder)]
        atheris.Setup(arguments, lambda data: check(target, data) and None)
        atheris.Fuzz()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
