"""README, docs/ and tests/README.md name only what exists, fit their size, and keep to plain words."""

import contextlib
import functools
import importlib.util
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_deeplab.__main__ import COMMANDS
from dist_deeplab.config.keys import AFFECTS, RENAMED, SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_deeplab"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("**/*.md")),
        *sorted((ROOT / "tests").glob("**/*.md")),
    ]
}
SHARDS_SUBCOMMANDS = ("index", "verify", "info", "masks")
MAX_README_LINES = 200
MAX_IMAGE_BYTES = 150_000

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w./-])(?:python -m|-m) (dist_deeplab(?:\.\w+)*)|(?<![\w./-])dist-deeplab ([a-z][\w-]*)")
SCRIPT = re.compile(r"(?<![\w/.-])(?:\./)?((?:tools|launch|slurm|tests|configs|docs|\.ci)/[\w./-]*\w)")
MODULE = re.compile(r"(?<![\w/])dist_deeplab(?:[./]\w+)+")
KEY = re.compile(r"(?<![\w./-])([a-z_]+)\.([a-z_0-9]+)(?==)")
QUOTED_KEY = re.compile(r"`([a-z_]+)\.([a-z_0-9]+)`")

PLAIN_WORDS = [
    (r"\bfor ever\b", "forever"),
    (r"\banew\b", "again"),
    (r"\bsigns? of life\b", "heartbeat"),
    (r"\bstands? still\b", "hangs, is frozen, waits"),
    (r"\bin the midst\b", "during"),
    (r"\bshall be\b", "is to be"),
    (r"\bso many\b", "N, that many"),
    (r"\bgoes on\b", "continues, resumes"),
    (r"\bculprits?\b", "stalled ranks"),
    (r"\beverybody's\b", "all ranks'"),
    (r"\brehears", "warm-up pass, dry run"),
    (r"\bfootprint\b", "memory estimate"),
    (r"\bking's moves\b", "Chebyshev distance"),
    (r"\bcall(s|ed)? the roll\b", "barrier"),
    (r"\bdeaf to\b", "ignores"),
    (r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b)[a-z]", "is not a"),
    (r"\bpictures?\b", "image, figure"),
    (r'"""Return what ', "name the thing"),
]


def without_code(text: str) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """What stands in backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", without_code(text))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def broken_links(page: str, text: str) -> Iterator[str]:
    """Relative links of a page whose file or anchor does not exist."""
    for target in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists():
            yield f"{target}: there is no file {file}"
        elif anchor and anchor not in anchors(text if not path else file.read_text(encoding="utf-8")):
            yield f"{target}: the page has no such heading"


def missing_paths(text: str) -> Iterator[str]:
    """Files and modules of this project that a page names and that do not exist."""
    for name in sorted(set(SCRIPT.findall(text))):
        if not (ROOT / name).exists():
            yield name
    for name in sorted(set(MODULE.findall(text))):
        path = ROOT / name if "/" in name else ROOT / name.replace(".", "/")
        is_attribute = "/" not in name and path.parent.with_suffix(".py").exists()
        if not (path.exists() or path.with_suffix(".py").exists() or is_attribute):
            yield name
    for name in re.findall(r"--config (\w+)(?=\s)", text):  # a recipe of the package, by its name
        if name != "FILE" and not (ROOT / "configs" / f"{name}.yaml").exists():
            yield f"--config {name}"
    folders = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    for name in inline_code(text):  # written from the package on: `training/step.py`, `model/weights/`
        in_package = re.fullmatch(r"([\w]+)/(?:[\w/]*/)?(?:[\w]+\.py)?", name)
        if in_package and in_package[1] in folders and not (PACKAGE / name).exists():
            yield name


def missing_commands(text: str) -> Iterator[str]:
    """Commands that a page names and that cannot be run."""
    for module, command in COMMAND.findall(text):
        if module and importlib.util.find_spec(module) is None:
            yield module
        if command and command not in COMMANDS:
            yield f"dist-deeplab {command}"


def missing_keys(text: str) -> Iterator[str]:
    """Keys of a section of the configuration that a page names and that do not exist."""
    for section, key in [*KEY.findall(text), *QUOTED_KEY.findall(without_code(text))]:
        is_file = key in ("py", "md", "json", "csv", "png", "yaml", "txt", "jsonl", "toml")
        name = f"{section}.{key}"
        if section in SECTIONS and not (is_file or name in AFFECTS or name in RENAMED):
            yield name


@functools.cache
def help_of(command: str, subcommand: str) -> str:
    """The options in `dist-deeplab COMMAND [SUBCOMMAND] --help`, without the manual before them."""
    module = importlib.import_module(f"dist_deeplab.{COMMANDS[command].module}")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        module.main([subcommand, "--help"] if subcommand else ["--help"])
    return out.getvalue().rpartition("\noptions:\n")[2]


def missing_options(text: str) -> Iterator[str]:
    """Options that a page gives to a command and that its help does not name."""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    for line in lines:
        for call in re.findall(r"(?:dist-deeplab |-m dist_deeplab\.)(\w[\w-]*(?:(?!-m dist_deeplab)[^`#|;])*)", line):
            command, *words = call.split()
            words = list(itertools.takewhile(lambda word: not word.endswith(".py"), words))  # the rest is a script's
            command = command.replace("_", "-")
            if command not in COMMANDS:
                continue
            subcommand = words[0] if command == "shards" and words and words[0] in SHARDS_SUBCOMMANDS else ""
            for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", " ".join(words)):
                if not re.search(rf"{option}(?![\w-])", help_of(command, subcommand)):
                    yield f"dist-deeplab {command} {subcommand} {option}"


def unplain_words(text: str) -> Iterator[str]:
    """Words of STYLE's left-hand side, with what to write."""
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, instead in PLAIN_WORDS:
            if found := re.search(pattern, line):
                yield f"line {number}: {found[0]!r}, write {instead}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    assert list(broken_links(page, PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_modules_exist(page: str) -> None:
    assert list(missing_paths(PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page: str) -> None:
    assert list(missing_commands(PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_are_in_their_help(page: str) -> None:
    assert list(missing_options(PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_named_keys_are_in_the_configuration(page: str) -> None:
    assert list(missing_keys(PAGES[page])) == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_use_plain_words(page: str) -> None:
    assert list(unplain_words(PAGES[page])) == []


def test_code_and_scripts_use_plain_words() -> None:
    files = [path for folder in ("dist_deeplab", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [path for folder in ("launch", "slurm", "configs") for path in sorted((ROOT / folder).iterdir())]
    found = {str(path.relative_to(ROOT)): list(unplain_words(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: words for path, words in found.items() if words} == {}


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= MAX_README_LINES


def test_every_page_is_linked() -> None:
    linked = set()
    for page, text in PAGES.items():
        linked |= {((ROOT / page).parent / target.partition("#")[0]).resolve() for target in LINK.findall(text)}
    assert [page for page in PAGES if page != "README.md" and ROOT / page not in linked] == []


@pytest.mark.parametrize("page", ["README.md", "docs/development.md"])
def test_the_maps_name_every_package(page: str) -> None:
    packages = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert {name for name in packages if not re.search(rf"(?<![\w/]){name}/(?!\w)", PAGES[page])} == set()


def test_images_are_used_and_small() -> None:
    used = {target for text in PAGES.values() for target in LINK.findall(text)}
    for image in (ROOT / "docs" / "images").iterdir():
        assert image.stat().st_size <= MAX_IMAGE_BYTES, image
        assert any(target.endswith(f"images/{image.name}") for target in used), image


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (lambda text: broken_links("README.md", text), "[a](docs/nothing.md)", "[a](docs/data.md)"),
        (lambda text: broken_links("docs/data.md", text), "[a](#no-heading)\n# Heading", "[a](#heading)\n# Heading"),
        (lambda text: broken_links("README.md", text), "![a](docs/images/none.png)", "[a](https://example.org/x.md)"),
        (missing_paths, "`dist_deeplab/nothing.py`", "`dist_deeplab/train.py`"),
        (missing_paths, "`dist_deeplab.training.nothing`", "`dist_deeplab.training.step`"),
        (missing_paths, "`training/nothing.py`", "`training/step.py` and `runs/x/nothing.py`"),
        (missing_paths, "run `./launch/nothing.sh x`", "run `./launch/test.sh x`"),
        (missing_paths, "```\npython tools/nothing.py\n```", "```\npython tools/benchmark.py step\n```"),
        (missing_paths, "train --config nothing x", "train --config quickstart x"),
        (missing_commands, "torchrun -m dist_deeplab.nothing", "torchrun -m dist_deeplab.train"),
        (missing_commands, "`dist-deeplab nothing`", "`dist-deeplab shards verify X`"),
        (missing_options, "dist-deeplab predict X --nothing", "dist-deeplab predict X --out DIR --overlay"),
        (missing_options, "dist-deeplab shards info X --split a", "dist-deeplab shards info X --sheet a.png"),
        (missing_keys, "data.nothing=3", "data.val=val.json"),
        (missing_keys, "`optim.rate`", "`optim.lr` and `metrics.json`"),
        (unplain_words, "it waits for ever", "it waits forever"),
        (unplain_words, "this is no error", "this is not an error; there is no file"),
        (unplain_words, '"""Return what is there."""', '"""What is there."""'),
    ],
)
def test_the_checks_see_what_is_wrong(check: object, bad: str, good: str) -> None:
    assert callable(check)
    assert len(list(check(bad))) == 1
    assert list(check(good)) == []
