# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`make_trainer`: a federation of a tiny model, of which a test says what is different."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedMixin,
    FederatedRewardConfig,
    FederatedRewardTrainer,
    FederatedTaskConfig,
    FederatedTaskTrainer,
    FederatedTrainer,
)

from .data import clients_of, preferences_of, token_rows
from .models import tiny_bert


# kind of trainer: its classes, and the task of its adapters
KINDS: dict[str, tuple[type[FederatedMixin], Any, str]] = {
    "sft": (FederatedTrainer, FederatedConfig, "CAUSAL_LM"),
    "dpo": (FederatedDPOTrainer, FederatedDPOConfig, "CAUSAL_LM"),
    "reward": (FederatedRewardTrainer, FederatedRewardConfig, "SEQ_CLS"),
    "task": (FederatedTaskTrainer, FederatedTaskConfig, "SEQ_CLS"),
}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **QUIET}
QUICK_TEXT = QUICK | {"max_length": 32, "gradient_checkpointing": False}
DEFAULT: Any = object()


def name_of(kind: str | type[FederatedMixin]) -> str:
    return kind if isinstance(kind, str) else next(key for key, (base, *_) in KINDS.items() if issubclass(kind, base))


def clients_for(kind: str, num_clients: int, rows: int) -> dict[str, Any]:
    if kind == "task":
        return {f"client_{client}": token_rows(client, rows) for client in range(num_clients)}
    clients = clients_of(num_clients, rows)
    return clients if kind == "sft" else preferences_of(clients)


def new_trainer(
    output_dir: str | Path,
    model: Any,
    clients: Any,
    eval_dataset: Any = None,
    *,
    kind: str | type[FederatedMixin] = "sft",
    **given: Any,
) -> Any:
    """
    A trainer with [`QUICK`] settings.

    Args:
        kind (`str` or class): A key of [`KINDS`], or a subclass of one of its trainers.
        given: Fields of the trainer's config, and what else its `__init__` takes.
    """
    base_class, config_class, _ = KINDS[name_of(kind)]
    trainer_class = base_class if isinstance(kind, str) else kind
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = dict(QUICK_TEXT if "max_length" in fields else QUICK)
    settings |= {key: given.pop(key) for key in list(given) if key in fields}
    args = config_class(output_dir=str(output_dir), **settings)
    model = str(model) if isinstance(model, Path) else model
    return trainer_class(model=model, args=args, train_dataset=clients, eval_dataset=eval_dataset, **given)


def make(
    folder: Path,
    tiny_model_dir: Path,
    output: str | Path = "out",
    peft_config: Any = DEFAULT,
    *,
    adapter: Any = DEFAULT,
    kind: str | type[FederatedMixin] = "sft",
    model: Any = None,
    clients: Any = None,
    num_clients: int = 3,
    rows: int = 16,
    eval_dataset: Any = None,
    eval_rows: int = 0,
    is_made: bool = True,
    **given: Any,
) -> Any:
    """
    What `make_trainer` calls.

    Args:
        peft_config: Of the trainer. `DEFAULT` takes `adapter`, unless the run has an adapter already.
        adapter: Fields of a `LoraConfig`, or another config, which is copied.
        model: `None` takes the tiny Llama, or a BERT for a `"task"`.
        clients, num_clients, rows: Clients; or how many are made, of how many rows.
        eval_dataset, eval_rows: Held-out rows; or how many of the first client's.
        is_made: Whether clients are made if there are none: a coordinator has none.
    """
    name = name_of(kind)
    if clients is None and is_made:
        clients = clients_for(name, num_clients, rows)
    if eval_dataset is None and eval_rows:
        eval_dataset = clients[next(iter(clients))].select(range(eval_rows))
    if model is None:
        model = tiny_bert() if name == "task" else tiny_model_dir
    if peft_config is DEFAULT:
        has_adapter = isinstance(model, PeftModel) or given.get("initial_adapter")
        peft_config = None if has_adapter else adapter_config(adapter, name)
    given = {"num_rounds": 2, **given}
    return new_trainer(folder / output, model, clients, eval_dataset, kind=kind, peft_config=peft_config, **given)


def adapter_config(adapter: Any, kind: str) -> Any:
    if adapter is DEFAULT:
        adapter = {"r": 4, "target_modules": ["query" if kind == "task" else "v_proj"]}
    if isinstance(adapter, dict):
        return LoraConfig(**{"task_type": KINDS[kind][2], **adapter})
    return copy.deepcopy(adapter)
