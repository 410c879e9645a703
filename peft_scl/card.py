# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The part of a model card that says how to load an SCL adapter, or what a FeDeRA adapter is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig


__all__ = ["FEDERA_TAG", "IMPORT_LINE", "LOADERS", "TAG", "update_federa_card", "update_model_card"]


IMPORT_LINE = "import peft_scl  # registers the PEFT type SCL"
TAG = "scl"
FEDERA_TAG = "federa"

LOADERS = {  # task type -> class of PEFT
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def update_model_card(folder: str | os.PathLike, config: PeftConfig) -> None:
    """
    Add to the `README.md` of `folder` how to load an SCL adapter, and the tag `scl`; create the file if there is none.

    Text that is there stays as it is. A card that has `import peft_scl` in it already gets no second section.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the adapter.
        config ([`~peft.PeftConfig`]):
            Its configuration, for the base model and the task.
    """
    _update(folder, _new_card(config, "SCL"), TAG, "import peft_scl", _section(config))


def update_federa_card(folder: str | os.PathLike, config: LoraConfig) -> None:
    """
    Add to the `README.md` of `folder` what kind of LoRA the adapter is, and the tag `federa`; create the file if there
    is none.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the adapter.
        config ([`~peft.LoraConfig`]):
            Its configuration, with the rank of the factors that were trained.
    """
    section = [
        "## Trained with FeDeRA",
        "",
        f"A LoRA of rank {2 * config.r} for the base model, which PEFT loads like any other. It was trained as FeDeRA "
        f"([arXiv:2404.18848](https://arxiv.org/abs/2404.18848)), with factors of rank {config.r} that start from the "
        "principal singular directions of the weights: `peft_scl.load_federa` continues that training.",
        "",
    ]
    _update(folder, _new_card(config, "FeDeRA"), FEDERA_TAG, section[0], section)


def _update(folder: str | os.PathLike, new: ModelCard, tag: str, marker: str, section: list[str]) -> None:
    """Add `tag`, and `section` unless `marker` is in the text already, to the card of `folder`, or to `new`."""
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else new
    before = str(card)
    data: Any = card.data
    if tag not in (data.tags or []):
        data.tags = sorted([*(data.tags or []), tag])
    if marker not in card.text:
        lines = card.text.splitlines()
        position = _first_section(lines)
        if position > 0 and lines[position - 1]:
            lines.insert(position, "")
            position += 1
        card.text = "\n".join([*lines[:position], *section, *lines[position:]])
    if not path.exists() or str(card) != before:
        card.save(path)


def _new_card(config: PeftConfig, method: str) -> ModelCard:
    base = config.base_model_name_or_path
    data = ModelCardData(
        library_name="peft",
        base_model=base if base and not os.path.isdir(base) else None,
        tags=[f"base_model:adapter:{base}"] if base else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {method} adapter{f' for `{base}`' if base else ''}\n\n")


def _section(config: PeftConfig) -> list[str]:
    where = '"this folder or repository"'
    loader = LOADERS.get(config.task_type or "")
    if loader is None:
        loader, where = "PeftModel", f"base_model, {where}"
    return [
        "## How to load this adapter",
        "",
        "This is an adapter of Sequential Compression Layers ([arXiv:2412.07021](https://arxiv.org/abs/2412.07021)), "
        "a method that PEFT knows once `peft_scl` is imported:",
        "",
        "```python",
        IMPORT_LINE,
        f"from peft import {loader}",
        "",
        f"model = {loader}.from_pretrained({where})",
        "```",
        "",
    ]


def _first_section(lines: list[str]) -> int:
    """Index of the first second-level heading, which ends the introduction of a card; the end if there is none."""
    fenced = False
    for index, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif line.startswith("## ") and not fenced:
            return index
    return len(lines)
