"""Write the launchers and the Slurm scripts to a folder, for use with an installed package.

    dist-deeplab scripts ~/deeplab
    cd ~/deeplab && sbatch --nodes 4 --gpus-per-node 8 slurm/train.sh --config voc_resnet101 data.train=...

They use the active environment, without one that of this command, and install nothing. Each script's --help is its
manual; runs/ is made in the folder that a launcher is called from, for slurm/ in the one where sbatch is called.
Scripts that are there already are replaced, and named where they differ. Exit codes: 0 done, 1 error, 2 wrong
arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.files import prepare_folder, replace_text
from dist_deeplab.packaged import packaged_folder

FOLDERS = ("launch", "slurm")
OF_CLONES = ("test.sh", "Containerfile", "install_in_image.sh")
"""Scripts that need the repository."""


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("scripts"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where launch/ and slurm/ are written")
    arguments = parser.parse_args(argv)
    try:
        write_scripts(arguments.folder)
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename or arguments.folder}", file=sys.stderr)
        return 1
    print(f"{arguments.folder}: launch/ and slurm/; {arguments.folder / 'launch/single_node.sh'} --help is a manual")
    return 0


def write_scripts(folder: Path) -> None:
    """Write launch/ and slurm/, and into launch/environment where the package is installed.

    Raises:
        UserError: the folder cannot be made, or is the clone that the scripts come from.
    """
    if packaged_folder("launch").parent.resolve() == folder.resolve():
        raise UserError(f"{folder} has these scripts already; choose another folder")
    for name in FOLDERS:
        prepare_folder(folder / name, remedy="choose another folder")
        for source in sorted(packaged_folder(name).iterdir()):
            if source.is_file() and source.suffix != ".py" and source.name not in OF_CLONES:
                write_script(source, folder / name / source.name)
    replace_text(folder / "launch" / "environment", f"{sys.prefix}\n")


def write_script(source: Path, target: Path) -> None:
    """Copy a script; say so where it replaces another one. What is run as a command is made executable."""
    text = source.read_text(encoding="utf-8")
    if target.exists() and target.read_text(encoding="utf-8", errors="replace") != text:
        print(f"replaced: {target}")
    replace_text(target, text)
    target.chmod(0o755 if text.startswith("#!") else 0o644)


if __name__ == "__main__":
    sys.exit(main())
