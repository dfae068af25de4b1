#!/usr/bin/env python3
"""The same as `dist-deeplab score`, from a clone without an installation: see its --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_deeplab.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
