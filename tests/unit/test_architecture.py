"""The package has levels: imports only go down, and packages on one level do not import each other.

    commands  __main__.py, train.py, evaluate.py and the others beside them, commands/
    level 4   training/  evaluation/  comparison/
    level 3   checkpointing/  tracking/
    level 2   distributed/  data/  model/
    level 1   config/  downloads/
    level 0   command_line.py  files.py  logs.py  packaged.py  workers.py
    level 0   files.py  locks.py  logs.py  redaction.py  workers.py
    below     errors.py  __init__.py

Read from the source by `ast`, so nothing has to be imported and a forbidden import inside a function counts too.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "dist_deeplab"
COMMANDS = 5
LEVELS = {
    "commands": COMMANDS,
    "training": 4,
    "evaluation": 4,
    "comparison": 4,
    "checkpointing": 3,
    "tracking": 3,
    "distributed": 2,
    "data": 2,
    "model": 2,
    "config": 1,
    "downloads": 1,
    "files": 0,
    "command_line": 0,
    "packaged": 0,
    "locks": 0,
    "logs": 0,
    "redaction": 0,
    "workers": 0,
    "errors": -1,
    "__init__": -1,
}
MAY_PASS_ON = {f"{NAME}.training.builders"}  # beside the commands
MAX_TRAIN_LINES = 250
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 6  # past that a record is missing
MANY_PARAMETERS = {  # three at most, each with its reason
    "model.sync_batch_norm._SyncNormalize.forward": "autograd differentiates direct arguments of forward only",
    "model.sync_batch_norm._SyncNormalizeByKernels.forward": "autograd differentiates direct arguments of forward only",
    "evaluation.crf.dense_crf": "its parameters are the CRF's, with the names of the keys of the section crf",
}


def _read_modules() -> dict[str, ast.Module]:
    """Dotted module name -> syntax tree, a package under `<package>.__init__`."""
    files = sorted((ROOT / NAME).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_bytes()) for file in files}


MODULES = _read_modules()


def package_of(module: str) -> str:
    """The folder or file directly under the package: `dist_deeplab.training.step` -> `training`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def level_of(package: str) -> int:
    return LEVELS.get(package, COMMANDS)


def imported_modules(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names of all that is imported anywhere in the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from dist_deeplab import config` names a module, `import __version__` does not
                is_package = base == NAME and any(package_of(other) == alias.name for other in MODULES)
                yield f"{base}.{alias.name}" if is_package else base


def forbidden_imports(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that do not go down."""
    own = package_of(module)
    targets = {name for name in imported_modules(module, tree) if name.split(".")[0] == NAME}
    return [
        f"{module} imports {target}"
        for target in sorted(targets)
        if package_of(target) != own and level_of(package_of(target)) >= level_of(own)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    assert forbidden_imports(module, MODULES[module]) == []


def test_every_package_has_a_level() -> None:
    folders = {package_of(module) for module in MODULES if module.count(".") > 1}
    assert folders <= set(LEVELS)
    assert {"training", "distributed", "checkpointing", "tracking", "data", "model", "train", "evaluate"} <= {
        package_of(module) for module in MODULES
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dist_deeplab.logs", "from dist_deeplab.config import RunConfig"),
        ("dist_deeplab.data.order", "def f():\n    from dist_deeplab import model"),
        ("dist_deeplab.model.resnet", "import dist_deeplab.distributed.parallel as p"),
        ("dist_deeplab.config", "from dist_deeplab.data import voc"),
        ("dist_deeplab.training.step", "from dist_deeplab.evaluation.confusion import scores"),
        ("dist_deeplab.evaluation.report", "from ..training import loss"),
        ("dist_deeplab.evaluation.report", "from dist_deeplab.train import main"),
        ("dist_deeplab.train", "from dist_deeplab import evaluate"),
        ("dist_deeplab.errors", "from . import config"),
    ],
)
def test_the_import_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(forbidden_imports(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dist_deeplab.train", "from dist_deeplab import config, __version__\nimport dist_deeplab.training.step"),
        ("dist_deeplab.training.step", "from dist_deeplab.data.loader import Batch\nfrom . import loss"),
        ("dist_deeplab.config", "from dist_deeplab.errors import UserError"),
    ],
)
def test_the_import_check_passes_a_proper_import(module: str, source: str) -> None:
    assert forbidden_imports(module, ast.parse(source)) == []


def test_train_is_one_readable_page() -> None:
    assert len((ROOT / NAME / "train.py").read_text(encoding="utf-8").splitlines()) < MAX_TRAIN_LINES


def test_train_imports_no_heavy_library_itself() -> None:
    imported = {name.split(".")[0] for name in imported_modules(f"{NAME}.train", MODULES[f"{NAME}.train"])}
    assert NAME in imported
    assert imported.isdisjoint({"mlflow", "apex", "webdataset", "cv2"})


def test_importing_train_loads_nothing_that_a_run_may_not_need() -> None:
    program = f"import json, sys, {NAME}.train; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert f"{NAME}.training.step" in loaded
    assert loaded.isdisjoint({"mlflow", "matplotlib", "cv2", "webdataset", "pandas", "apex"})


def main_rank_knowledge(tree: ast.AST, *, may_pass_on: bool) -> list[str]:
    """What a module knows of the main rank: `is_main`, or a rank compared with 0.

    `may_pass_on`: `env.is_main` as the argument of a call is fine, a decision by it is not.
    """
    passed_on = set()
    if may_pass_on:
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            passed_on |= {id(argument) for argument in [*call.args, *(keyword.value for keyword in call.keywords)]}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and _name(node) == "is_main" and id(node) not in passed_on:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if not any(isinstance(side, ast.Constant) and side.value == 0 for side in sides):
                sides = []
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            sides = [node.operand]
        if any("rank" in _name(side) for side in sides):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) != "distributed"])
def test_only_distributed_knows_the_main_rank(module: str) -> None:
    may_pass_on = level_of(package_of(module)) == COMMANDS or module in MAY_PASS_ON
    found = main_rank_knowledge(MODULES[module], may_pass_on=may_pass_on)
    assert found == []


@pytest.mark.parametrize(
    ("source", "in_command", "elsewhere"),
    [
        ("f(is_main=env.is_main)", 0, 1),
        ("f(env.is_main)", 0, 1),
        ("if env.is_main: pass", 1, 1),
        ("x = 1 if env.is_main else 2", 1, 1),
        ("env.rank == 0", 1, 1),
        ("0 != dist.get_rank()", 1, 1),
        ("not self.rank", 1, 1),
        ("f(env.rank, rank=env.rank, n=rank + 0)", 0, 0),
    ],
)
def test_the_main_rank_check_sees_decisions(source: str, in_command: int, elsewhere: int) -> None:
    assert len(main_rank_knowledge(ast.parse(source), may_pass_on=True)) == in_command
    assert len(main_rank_knowledge(ast.parse(source), may_pass_on=False)) == elsewhere


@pytest.mark.parametrize("module", MODULES)
def test_no_global_statement_and_no_bare_except(module: str) -> None:
    nodes = list(ast.walk(MODULES[module]))
    assert [node.lineno for node in nodes if isinstance(node, ast.Global)] == []
    assert [node.lineno for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None] == []


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(module: str, tree: ast.AST) -> Iterator[tuple[str, Function]]:
    """Name from the module on, `module.Class.method`, and syntax tree of all functions, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, Function | ast.ClassDef)
        name = f"{module}.{node.name}" if named else module
        if isinstance(node, Function):
            yield name, node
        yield from functions(name, node)


def num_parameters(function: Function) -> int:
    """Number of parameters, `*args` and `**kwargs` as one each, without a leading self or cls."""
    own = function.args
    every = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
    return len(every) - (bool(every) and every[0].arg in ("self", "cls"))


def num_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_three_functions_have_many_parameters_and_need_them() -> None:
    found = {
        name.removeprefix(f"{NAME}.")
        for module, tree in MODULES.items()
        for name, function in functions(module, tree)
        if num_parameters(function) > MAX_PARAMETERS
    }
    assert found == set(MANY_PARAMETERS), "find the missing record; or take from the list what no longer needs it"
    assert len(MANY_PARAMETERS) <= 3


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    lengths = {name: num_lines(function) for name, function in functions(module, MODULES[module])}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize(
    ("source", "names", "parameters", "lines"),
    [
        ("def f(a, /, b, *c, d=1, **e):\n    pass", ["m.f"], [5], [2]),
        (
            "class A:\n    @classmethod\n    def f(cls, a): pass\n    async def g(self): pass",
            ["m.A.f", "m.A.g"],
            [1, 0],
            [1, 1],
        ),
        ("def f(a):\n    if a:\n        def g(b, self): pass\n    return g", ["m.f", "m.f.g"], [1, 2], [4, 1]),
        ("f = lambda a, b: a", [], [], []),
    ],
)
def test_the_size_check_counts(source: str, names: list[str], parameters: list[int], lines: list[int]) -> None:
    found = list(functions("m", ast.parse(source)))
    assert [name for name, _ in found] == names
    assert [num_parameters(function) for _, function in found] == parameters
    assert [num_lines(function) for _, function in found] == lines
