# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a run."""

from __future__ import annotations

import html
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_scl.card import IMPORT_LINE, LOADERS

from ..methods.objectives import LOCAL_OBJECTIVES, LocalObjective
from .figures import evaluations


__all__ = ["model_card"]

_METHODS = {
    "SCL": "Sequential Compression Layers ([arXiv 2412.07021](https://huggingface.co/papers/2412.07021)), implemented "
    "by `peft_scl`",
    "FEDERA": "FeDeRA ([arXiv 2404.18848](https://huggingface.co/papers/2404.18848)), trained with `peft_scl` and "
    "saved as a plain LoRA",
}


def model_card(
    record: dict[str, Any],
    task_type: str | None,
    repo_id: str | None,
    base_model_id: str | None = None,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
    model_class: str | None = None,
    num_labels: int | None = None,
) -> ModelCard:
    """
    The model card of a run.

    Args:
        record (`dict`):
            The record as it is published ([`published_record`]).
        task_type (`str`, *optional*):
            PEFT task type, which decides the class in the example.
        repo_id (`str`, *optional*):
            Where the adapter will live; shown in the example.
        base_model_id (`str`, *optional*):
            Hub id of the base model, for the metadata; none for a local folder.
        model_name (`str`, *optional*):
            Title of the card; the last part of `repo_id` if not given.
        dataset_name (`str`, *optional*):
            Hub id of the dataset, for the metadata.
        tags (`list[str]`, *optional*):
            Further tags.
        model_class (`str`, *optional*):
            Class of `transformers` of the model, of an adapter that of its base.
        num_labels (`int`, *optional*):
            Number of labels of a classifier, which an adapter's example has to name.
    """
    lines = [
        f"# {_text(model_name or (repo_id or 'Federated adapter').split('/')[-1])}",
        "",
        _first_sentence(record, model_class),
        "",
        *_facts(record),
        "",
        "## How to load it",
        "",
        "```python",
        *([IMPORT_LINE] if record["peft_type"] == "SCL" else []),
        *_loading(record, task_type, repo_id or "path/to/this/folder", base_model_id, model_class, num_labels),
        "```",
        "",
        *_what_stays(record),
    ]
    if curve := _curve(record):
        lines += [f"## Held-out metrics of the {_evaluated(record)}", "", *curve, ""]
    lines += ["A record of the run is in `federation.json`.", ""]
    data = _metadata(record["peft_type"], base_model_id, dataset_name, tags or [])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _metadata(
    method: str | None, base_model_id: str | None, dataset_name: str | None, tags: list[str]
) -> ModelCardData:
    own_tags = ["federated-learning", "fed_trainer"]
    own_tags += [method.lower()] if method else []
    own_tags += ["peft_scl"] if method == "SCL" else []
    return ModelCardData(
        base_model=base_model_id,
        library_name="peft" if method else "transformers",
        datasets=dataset_name,
        tags=own_tags + [tag for tag in tags if tag not in own_tags],
    )


def _first_sentence(record: dict[str, Any], model_class: str | None) -> str:
    method, base = record["peft_type"], _base(record)
    what = f"A {method} adapter for {base}" if method else f"{model_class} from {base}"
    return f"{what}, fine-tuned by federated learning with `fed_trainer`."


def _base(record: dict[str, Any]) -> str:
    return _code(record["base_model"]) if record["base_model"] else "an unnamed base model"


def _facts(record: dict[str, Any]) -> list[str]:
    """The table of what the run was."""
    method, rounds = record["peft_type"], record["rounds"]
    return [
        "| | |",
        "|---|---|",
        f"| base model | {_base(record)} |",
        f"| method | {_METHODS.get(method, method or 'fine-tuning without an adapter')} |",
        f"| aggregation | `{record['aggregation']}`{_beside(record['federation'])} |",
        f"| rounds | {len(rounds)} of {record['num_rounds']} |",
        f"| clients | {len(record['clients'])}, {record['num_sampled']} per round |",
        f"| split | {_text(record['partition'] or 'not stated')} |",
        _examples(record),
        f"| trainable parameters | {record['num_trainable_parameters']:,} |",
        f"| sent per client and round | {_megabytes(rounds)} |",
        f"| seed | {record['seed']} |",
    ]


def _what_stays(record: dict[str, Any]) -> list[str]:
    """What the clients have learnt and keep, which is not in the model."""
    lines = []
    if num_local := record.get("num_local_parameters"):
        lines += [
            f"{num_local:,} of the trained parameters stay with the clients. Here they have their initial values: "
            "what is published is the shared part, to be trained further, and no model of any client.",
            "",
        ]
    if (objective := _personal_objective(record)) is not None:
        name = objective.__name__
        lines += [
            f"Every client has trained a model of its own too ({name}), which stays with it. This is the global one.",
            "",
        ]
    return lines


def _evaluated(record: dict[str, Any]) -> str:
    if record.get("num_local_parameters") or _personal_objective(record) is not None:
        return "clients' own models"
    return f"global {'adapter' if record['peft_type'] else 'model'}"


def _personal_objective(record: dict[str, Any]) -> type[LocalObjective] | None:
    """The local objective, if clients train models of their own by it."""
    objective = LOCAL_OBJECTIVES.get(record["federation"]["local_objective"])
    return objective if objective is not None and objective.is_personal else None


def _loading(
    record: dict[str, Any],
    task_type: str | None,
    source: str,
    base_model_id: str | None,
    model_class: str | None,
    num_labels: int | None,
) -> list[str]:
    """The lines of the example, behind the import of `peft_scl`."""
    if record["peft_type"] is None:
        return [
            f"from transformers import {model_class}",
            "",
            "",
            f'model = {model_class}.from_pretrained("{source}")',
        ]
    # For images PEFT has no task type.
    saves_head = not {"classifier", "score"}.isdisjoint(record["peft_config"].get("modules_to_save") or [])
    has_head = task_type in ("SEQ_CLS", "TOKEN_CLS") or (task_type is None and saves_head)
    if not has_head or num_labels is None or model_class is None:
        loader = LOADERS.get(task_type or "", "AutoPeftModel")
        return [f"from peft import {loader}", "", "", f'model = {loader}.from_pretrained("{source}")']
    # The checkpoint of the base may have a head of other classes. `AutoPeftModel` would let the adapter differ in its
    # sizes as well.
    base = base_model_id or "path/to/the/base/model"
    return [
        "from peft import PeftModel",
        f"from transformers import {model_class}",
        "",
        "",
        f'base = {model_class}.from_pretrained("{base}", num_labels={num_labels}, ignore_mismatched_sizes=True)',
        f'model = PeftModel.from_pretrained(base, "{source}")  # with the head that was trained',
    ]


def _beside(federation: dict[str, Any]) -> str:
    """The server optimiser and the local objective, where they are not the plain ones."""
    optimizer, objective = federation["server_optimizer"], federation["local_objective"]
    named = [f"`{optimizer}` on the server"] if optimizer != "sgd" else []
    named += [f"`{objective}` at the clients"] if objective is not None else []
    return "".join(f", {name}" for name in named)


def _examples(record: dict[str, Any]) -> str:
    """The row on the numbers of examples, as far as they are let out."""
    sizes = [client["num_examples"] for client in record["clients"].values()]
    if None not in sizes:
        return f"| examples per client | {min(sizes)} to {max(sizes)}, {sum(sizes)} in all |"
    return f"| examples | {'not stated' if record['num_examples'] is None else record['num_examples']} |"


def _text(text: str) -> str:
    """Free text on one line, with what Markdown and HTML would make of it taken literally."""
    line = html.escape(" ".join(text.encode("utf-8", "replace").decode().split()), quote=False)
    # an underscore within a word stands for itself
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _code(text: str) -> str:
    """`text` as code, if it has no signs that code would not hold in the cell of a table."""
    return _text(text) if re.search(r"[`|<>&\ud800-\udfff]|[^\S ]", text) else f"`{text}`"


def _megabytes(rounds: list[dict[str, Any]]) -> str:
    if not rounds or rounds[-1]["bytes_up"] is None:
        return "-"
    sent, received, clients = rounds[-1]["bytes_up"], rounds[-1]["bytes_down"], len(rounds[-1]["clients"])
    return f"{sent / clients / 1e6:.3f} MB up, {received / clients / 1e6:.3f} MB down"


def _curve(record: dict[str, Any]) -> list[str]:
    measured = evaluations(record)
    keys = list(dict.fromkeys(key for metrics in measured.values() for key in metrics))
    if not keys:
        return []
    rows = [
        " | ".join([str(round), *(_cell(metrics[key]) if key in metrics else "-" for key in keys)])
        for round, metrics in measured.items()
    ]
    return [
        f"| round | {' | '.join(map(_text, keys))} |",
        "|---" * (1 + len(keys)) + "|",
        *(f"| {row} |" for row in rows),
    ]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"
