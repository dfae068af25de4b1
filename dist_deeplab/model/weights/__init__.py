"""Weights from a file: recognised by their contents, fitted to our names, with what they expect of their input.

`load_weights` reads every family that people start from, `fit_weights` puts them into a network and reports.
"""

from dist_deeplab.model.weights.fitting import Report, backbone_of, fit_weights
from dist_deeplab.model.weights.formats.torch_file import load_file
from dist_deeplab.model.weights.loading import load_weights
from dist_deeplab.model.weights.variant import SCRATCH, Variant, Weights

__all__ = ["SCRATCH", "Report", "Variant", "Weights", "backbone_of", "fit_weights", "load_file", "load_weights"]
