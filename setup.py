"""Phalanx: plans, rehearses, launches and carries home the pretraining of Mixture-of-Experts transformers."""

from setuptools import find_packages, setup

setup(
    name="phalanx",
    version="0.1.0",
    description="Plans, rehearses, launches and carries home the pretraining of Mixture-of-Experts transformers",
    python_requires=">=3.11",
    packages=find_packages(include=["configs*", "parallel*", "pretrain*", "launch*", "tools*"]),
    package_data={"configs": ["**/*.yaml", "*.json"], "launch": ["slurm/templates/*"], "tools": ["planner/data/*"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        "deepspeed>=0.19.8",
        "wandb>=0.22",
        "omegaconf>=2.3",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "transformers>=4.57",
        "numpy>=1.26",
        "rich>=13",
        "jinja2>=3.1",
        "psutil>=5.9",
        "pyarrow>=15",
        "zstandard>=0.22",
    ],
    extras_require={"dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "pyright", "peft"]},
    entry_points={"console_scripts": ["phalanx=tools.cli:main"]},
)
