# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer serve RUN.yaml --at ADDRESS`"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..federation.transport.ends import Network
from ..output.report import round_table
from ..trainers.mixin import FederatedMixin
from .building import build_trainer
from .data import load_rows
from .run_file import RunFile, config_of, peft_config_of
from .table import live_table


__all__ = ["coordinator_of", "serve"]


def coordinator_of(run: RunFile, **overrides: Any) -> FederatedMixin:
    """
    The trainer of a coordinator.

    Args:
        run ([`RunFile`]):
            The run.
        overrides (`dict[str, Any]`, *optional*):
            Fields of the config, in place of those of the run.

    Raises:
        ValueError: If the run cannot be.
    """
    args = config_of(run.part, {**run.config, **overrides})
    held_out = None if run.eval_dataset is None else load_rows(run.eval_dataset)
    init: Any = getattr(args, "model_init_kwargs", None) or {}
    try:
        trainer = build_trainer(
            run.part,
            run.model_name_or_path,
            args,
            peft_config_of(run.peft_config, run.part.task_type),
            run.data_fields,
            run.num_labels,
            None,
            held_out,
            trust_remote_code=bool(init.get("trust_remote_code")),
        )
    except TypeError as error:  # of a value of another type, deep in a library
        raise ValueError(
            f"The model of the run, or its adapter, cannot be made of these settings ({error})."
        ) from error
    trainer._told = {"data": dataclasses.asdict(run.data_fields), "num_labels": run.num_labels}
    return trainer


def serve(run: RunFile, network: Network, resume: str | bool | None = None, **overrides: Any) -> FederatedMixin:
    """
    Coordinate a run until it is over.

    Args:
        run ([`RunFile`]):
            The run.
        network ([`Network`]):
            Where the clients are met.
        resume (`str` or `bool`, *optional*):
            As `resume_from_checkpoint` of [`FederatedMixin.serve`].
        overrides (`dict[str, Any]`, *optional*):
            Fields of the config, in place of those of the run.

    Returns:
        [`FederatedMixin`]: The trainer, with the result.
    """
    with live_table() as show:
        overrides |= {} if show is None else {"disable_tqdm": True}  # the table is in the place of the bar
        trainer = coordinator_of(run, **overrides)
        trainer.serve(network, run.clients, run.wait, run.round_timeout, resume, show)
    if show is not None:
        print(round_table(trainer.record))
    return trainer
