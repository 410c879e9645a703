# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup


extras = {
    "deepspeed": ["deepspeed>=0.19"],
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2"],
    "quantization": ["bitsandbytes>=0.50.2", "torchao>=0.18"],
    "report": ["matplotlib>=3.8"],
}
extras["dev"] = [
    *extras["report"],
    "hypothesis>=6.100",
    "import-linter>=2.17",
    "mypy>=1.10",
    "pytest>=8.4",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "ruff>=0.5",
    "setuptools>=68",
    "types-PyYAML",
]

setup(
    name="peft-scl",
    version="0.1.0.dev0",
    description="Federated fine-tuning of foundation models with PEFT and TRL: Sequential Compression Layers and more",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    packages=find_packages(include=["peft_scl", "peft_scl.*", "fed_trainer", "fed_trainer.*"]),
    entry_points={"console_scripts": ["scl-to-lora=peft_scl.convert:main"]},
    package_data={"peft_scl": ["py.typed"], "fed_trainer": ["py.typed"]},
    # Lower bounds are the versions this was developed and tested with; nothing is known about older ones. The upper
    # bounds of peft, transformers and trl stand because a tuner and a trainer rely on their internals
    # (docs/federation.md).
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "filelock>=4.2",
        "huggingface-hub>=2.4,<3",
        "numpy>=1.26",
        "peft>=0.21.2,<0.23",
        "safetensors>=0.8",
        "torch>=2.13",
        "tqdm>=4.67",
        "transformers>=5.23,<6",
        "trl>=1.16,<2",
    ],
    extras_require=extras,
)
