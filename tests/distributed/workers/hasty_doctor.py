"""The doctor that measures the loader for a moment only."""

from dist_deeplab import doctor
from dist_deeplab.training import rates


def main(arguments: list[str]) -> int:
    rates._LOADER_S = 0.5
    return doctor.main(arguments)
