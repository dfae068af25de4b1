"""Coverage-guided fuzzing of the readers of foreign bytes, for a limited time.

    python tests/fuzz/run_atheris.py --seconds 60                      # each target for a minute
    python tests/fuzz/run_atheris.py weights_npy manifest --seconds 600 --corpus ~/fuzz_corpus

Needs `pip install atheris` (Linux). Each target runs in a process of its own, as many at a time as there are cores.
An input that breaks a reader is kept as
tests/fuzz/corpus/<target>/crash-<SHA-1>, where the tests find it from then on. Exit code: 1 if there is one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

INSTRUMENTED = ["dist_deeplab", "pickle", "zipfile", "tarfile", "json", "yaml", "numpy.lib", "safetensors"]
MAX_INPUT = 2**17
LIMITS = ["-timeout=30", "-rss_limit_mb=4096", f"-max_len={MAX_INPUT}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="per target (default: 60)")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found to reach new code")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        fuzz(arguments.targets[0], arguments.seconds, arguments.corpus)
    from tests.fuzz.harness import all_targets

    def is_sound(name: str) -> bool:
        with tempfile.TemporaryDirectory(prefix="fuzz_corpus_") as temporary:
            folder = arguments.corpus / name if arguments.corpus else Path(temporary)
            options = ["--here", "--seconds", str(arguments.seconds), "--corpus", str(folder)]
            done = subprocess.run(
                [sys.executable, __file__, name, *options], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        if done.returncode:
            print(done.stdout.decode(errors="replace"))
        print(f"{name}: {'BROKEN' if done.returncode else 'nothing found'} in {arguments.seconds} s", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 0 if all(list(pool.map(is_sound, arguments.targets or [target.name for target in all_targets()]))) else 1


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Run one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.harness import CORPUS, all_targets, check

        target = next(target for target in all_targets() if target.name == name)  # imports the readers
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.corpus()):
        (folder / f"seed_{number}").write_bytes(data)
    crashes = CORPUS / name
    crashes.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/", *LIMITS]
    atheris.Setup([sys.argv[0], *options, str(folder)], lambda data: check(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
