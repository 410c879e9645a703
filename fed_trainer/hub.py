# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Fetching an adapter to start from, the model card, and publishing."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, snapshot_download

from peft_scl.card import IMPORT_LINE, LOADERS

from .figures import evaluations


__all__ = ["PUBLISHED_FILES", "fetch_adapter", "model_card", "publish"]


# what a run writes, by name: `output_dir` may hold files of the user's too
PUBLISHED_FILES = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "federation.json", "trainer_state.json",
    "config.json", "generation_config.json", "model.safetensors",  # without an adapter
    "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
]  # fmt: skip


def fetch_adapter(source: str, revision: str | None = None, token: str | None = None) -> Path:
    """
    Local folder of an adapter that is either a folder already or a repository on the Hub.

    Args:
        source (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        token (`str`, *optional*):
            Hub token; the one logged in with if not given.

    Raises:
        ValueError: If a revision is asked of a local folder.
    """
    if not os.path.isdir(source) and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise ValueError(
            f"The adapter {source!r} is neither a folder here nor a Hub id (`user/name`). Check the path."
        )
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(
                f"The adapter {source!r} is a local folder, which has no revision {revision!r}. Give a Hub id, or leave the "
                "revision out."
            )
        return Path(source)
    return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=["*.safetensors", "*.json"]))


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None,
    token: str | None,
    revision: str | None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Upload the safetensors, JSON and Markdown files of `folder` (not of folders in it) as one commit."""
    api = HfApi(token=token)
    upload = functools.partial(
        api.upload_folder,
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        allow_patterns=PUBLISHED_FILES,
        ignore_patterns=["*/*"],
    )
    return upload() if blocking else api.run_as_future(upload)


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
            The content of `federation.json`.
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
    method, scl = record["peft_type"], record["peft_type"] == "SCL"
    own_tags = [
        "federated-learning",
        "fed_trainer",
        *([method.lower()] if method else []),
        *(["peft_scl"] if scl else []),
    ]
    data = ModelCardData(
        base_model=base_model_id,
        library_name="peft" if method else "transformers",
        datasets=dataset_name,
        tags=own_tags + [tag for tag in tags or [] if tag not in own_tags],
    )
    base = f"`{record['base_model']}`" if record["base_model"] else "an unnamed base model"
    rounds = record["rounds"]
    methods = {
        "SCL": "Sequential Compression Layers ([arXiv 2412.07021](https://huggingface.co/papers/2412.07021)), implemented by "
        "`peft_scl`",
        "FEDERA": "FeDeRA ([arXiv 2404.18848](https://huggingface.co/papers/2404.18848)), trained with `peft_scl` and saved as a "
        "plain LoRA",
    }
    per_client = [client["num_examples"] for client in record["clients"].values()]
    lines = [
        f"# {model_name or (repo_id or 'Federated adapter').split('/')[-1]}",
        "",
        f"{f'A {method} adapter for {base}' if method else f'{model_class} from {base}'}, fine-tuned by federated learning with `fed_trainer`.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base} |",
        f"| method | {methods.get(method, method or 'fine-tuning without an adapter')} |",
        f"| aggregation | `{record['aggregation']}`{_beside(record['federation'])} |",
        f"| rounds | {len(rounds)} of {record['num_rounds']} |",
        f"| clients | {len(per_client)}, {record['num_sampled']} per round |",
        f"| split | {record['partition'] or 'not stated'} |",
        f"| examples per client | {min(per_client)} to {max(per_client)}, {sum(per_client)} in all |",
        f"| trainable parameters | {record['num_trainable_parameters']:,} |",
        f"| sent per client and round | {_megabytes(rounds)} |",
        f"| seed | {record['seed']} |",
        "",
        "## How to load it",
        "",
        "```python",
        *([IMPORT_LINE] if scl else []),
        *_loading(record, task_type, repo_id or "path/to/this/folder", base_model_id, model_class, num_labels),
        "```",
        "",
    ]
    if num_local := record.get("num_local_parameters"):
        lines += [
            f"{num_local:,} of the trained parameters stay with the clients. Here they have their initial values: what is published is "
            "the shared part, to be trained further, and no model of any client.",
            "",
        ]
    is_ditto = record["federation"]["local_objective"] == "ditto"
    if is_ditto:
        lines += [
            "Every client has trained a model of its own too (Ditto), which stays with it. This is the global one.",
            "",
        ]
    is_personal = num_local or is_ditto
    evaluated = "clients' own models" if is_personal else f"global {'adapter' if method else 'model'}"
    if curve := _curve(record):
        lines += [f"## Held-out metrics of the {evaluated}", "", *curve, ""]
    lines += ["The whole record of the run is in `federation.json`.", ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


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
    # The checkpoint of the base may have a head of other classes. `AutoPeftModel` would let the adapter differ in its sizes as well.
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


def _megabytes(rounds: list[dict[str, Any]]) -> str:
    if not rounds:
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
    return [f"| round | {' | '.join(keys)} |", "|---" * (1 + len(keys)) + "|", *(f"| {row} |" for row in rows)]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"
