"""Files that come with the package: recipes (configs/), launchers (launch/) and batch scripts (slurm/).

In a clone they are beside the package, in a wheel inside it (setup.py puts them there): the same files.
"""

from pathlib import Path

PACKAGE = Path(__file__).parent


def packaged_folder(name: str) -> Path:
    """Folder `configs`, `launch` or `slurm` of the wheel or the clone that this module belongs to."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def mlflow_ui(uri: str) -> str:
    """The command that shows the runs of a store that is a file: the launcher of the clone, or MLflow's own."""
    if packaged_folder("launch") == PACKAGE / "launch":
        return f"mlflow server --backend-store-uri {uri}"
    return "./launch/mlflow_ui.sh"


def recipe_names() -> list[str]:
    """Names that `--config` takes beside paths: voc_resnet101 for configs/voc_resnet101.yaml."""
    return sorted(file.stem for file in packaged_folder("configs").glob("*.yaml"))


def find_recipe(path: Path) -> Path:
    """`path`, or the packaged recipe of this name where there is no such file."""
    recipe = packaged_folder("configs") / f"{path.name.removesuffix('.yaml')}.yaml"
    is_name = path.parent in (Path(), Path("configs"))
    return recipe if is_name and not path.exists() and recipe.exists() else path
