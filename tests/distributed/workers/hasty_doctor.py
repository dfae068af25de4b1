"""The doctor that measures the loader for a moment only: hasty_doctor.py ARGUMENTS..."""

import sys

from dist_deeplab import doctor
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.training import rates

rates._LOADER_S = 0.5
hard_exit(doctor.main(sys.argv[1:]))
