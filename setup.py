# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup


extras = {
    "deepspeed": ["deepspeed>=0.19"],
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2"],
    "gcs": ["gcsfs>=2026.2"],
    "keys": ["cryptography>=47"],
    "nvflare": ["nvflare>=2.9"],
    "quantization": ["bitsandbytes>=0.50.2", "torchao>=0.18"],
    "report": ["matplotlib>=3.8"],
    "s3": ["s3fs>=2026.2"],
}
extras["dev"] = [
    *extras["keys"],
    *extras["report"],
    *extras["s3"],
    "hypothesis>=6.100",
    "import-linter>=2.17",
    "moto[server]>=5.2",
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
    entry_points={"console_scripts": ["fed-trainer=fed_trainer.cli:main", "scl-to-lora=peft_scl.convert:main"]},
    package_data={"peft_scl": ["py.typed"], "fed_trainer": ["py.typed"]},
    # Lower bounds are the versions this was developed and tested with; nothing is known about older ones. The upper
    # bounds of peft, transformers and trl stand because a tuner and a trainer rely on their internals
    # (docs/federation.md).
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "filelock>=4.2",
        "fsspec>=2026.2",
        "huggingface-hub>=2.4,<3",
        "numpy>=1.26",
        "peft>=0.21.2,<0.23",
        "pyyaml>=6",
        "safetensors>=0.8",
        "torch>=2.13",
        "tqdm>=4.67",
        "transformers>=5.23,<6",
        "trl>=1.16,<2",
    ],
    extras_require=extras,
)
