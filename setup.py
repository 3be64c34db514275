"""Phalanx: plans, rehearses and launches the pretraining of Mixture-of-Experts transformers, and converts their checkpoints."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
OURS = find_packages(include=["configs*", "parallel*", "pretrain*", "launch*", "tools*"])
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (HERE / "configs" / "__init__.py").read_text(), re.MULTILINE)

setup(
    name="phalanx",
    version=VERSION,
    description="Plans, rehearses and launches the pretraining of Mixture-of-Experts transformers and converts their checkpoints",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # What was tested: docs/on-your-cluster.md.
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    # The console script is a package of its own name, which no folder of a project, and no clone of this one, shadows.
    packages=[*OURS, "phalanx_command"],
    package_dir={"phalanx_command": "tools/entry"},
    package_data={
        "": ["py.typed"],
        "configs": ["**/*.yaml", "*.json"],
        "launch": ["slurm/templates/*"],
        "tools": ["planner/data/*", "report/page/*"],
    },
    install_requires=[
        "torch>=2.6",
        # Private names of these two are replaced (parallel/compat): the bounds are the versions that were tested.
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.19.8,<0.20",
        "wandb>=0.22",
        "omegaconf>=2.3",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "transformers>=4.57",
        "numpy>=1.26",
        "orjson>=3.10",
        "rich>=13",
        "scipy>=1.11",
        "jinja2>=3.1",
        "psutil>=5.9",
        "pyarrow>=15",
        "zstandard>=0.22",
    ],
    extras_require={
        "evaluate": ["lm-eval>=0.4.9"],
        "tensorboard": ["tensorboard>=2.18"],
        "mlflow": ["mlflow-skinny>=3.1", "sqlalchemy>=2.0", "alembic>=1.13"],
        "report": ["plotly>=5", "pillow"],
        "dev": [
            *("lm-eval>=0.4.9", "tensorboard", "mlflow-skinny", "sqlalchemy", "alembic", "plotly>=5", "selenium"),
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "pyright", "peft"),
            *("mkdocs-material", "setuptools", "wheel"),
        ],
    },
    entry_points={"console_scripts": ["phalanx=phalanx_command:main"]},
)
