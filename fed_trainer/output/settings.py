# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The settings of a run as its record keeps them: every field of the config, also of a user's own, but those that are
listed here. So what is not thought of is compared when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback

from ..config import FederationArguments
from ..state.described import described, is_secret, qualified_name


__all__ = ["COMPARED_ELSEWHERE", "MAY_DIFFER", "described_arguments", "federation_settings", "local_settings"]


# by reason
MAY_DIFFER = MappingProxyType(
    {
        "how far the run goes, and what is done about clients that fail": (
            "num_rounds", "min_clients", "client_retries", "client_timeout", "resume_from_checkpoint", "ddp_timeout",
        ),
        "where things are written, shown and published, and how often": (
            "output_dir", "partition", "eval_rounds", "save_rounds", "eval_on_start", "save_total_limit",
            "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
            "trackio_static_space_id", "log_level", "log_level_replica", "log_on_each_node",
            "include_num_input_tokens_seen", "skip_memory_metrics", "debug", "push_to_hub", "hub_token",
            "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
            "publish_client_names", "publish_client_metrics", "publish_label_counts",
        ),
        "no effect in a federation, or refused by its config": (
            "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay",
            "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "enable_jit_checkpoint",
            "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "auto_find_batch_size",
            "ignore_data_skip", "restore_callback_states_from_checkpoint", "do_train", "do_eval", "do_predict",
        ),
        "memory and speed: the same sums, held, fetched or sent in another way": (
            "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
            "activation_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps",
            "eval_accumulation_steps", "eval_use_gather_object", "dataset_num_proc", "dataloader_pin_memory",
            "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
            "ddp_find_unused_parameters", "ddp_static_graph", "local_rank",
        ),
        "the machine, on which the last bits depend, and so does what a collator draws in a worker": (
            "use_cpu", "dataloader_num_workers", "ddp_backend", "ddp_bucket_cap_mb",
        ),
    }
)  # fmt: skip

# fields that the record holds by what follows from them
COMPARED_ELSEWHERE = MappingProxyType(
    {
        "aggregation": "aggregation",
        "clients_per_round": "num_sampled",
        "initial_adapter": "initial_digest",
        "initial_adapter_revision": "initial_digest",
        "label_column": "clients",
        "seed": "seed",
    }
)

_LEFT_OUT = frozenset(name for names in MAY_DIFFER.values() for name in names) | COMPARED_ELSEWHERE.keys()
_OF_LIBRARIES = ("transformers.", "accelerate.")
# the first by class, the second by a digest of its weights in the checkpoint
_BY_OTHER_MEANS = frozenset({"callbacks", "ref_model"})


def local_settings(args: TrainingArguments) -> dict[str, Any]:
    """
    What decides about the result of a local round and its evaluation, apart from data, model and adapter. A field of a
    user's own may say that it does not: `field(default=..., metadata={"may_differ": True})`.
    """
    ours = _federation_fields()
    names = [field.name for field in fields(args) if field.name not in ours and not field.metadata.get("may_differ")]
    return {"world_size": args.world_size, **_recorded(args, names)}


def federation_settings(args: FederationArguments) -> dict[str, Any]:
    """What decides about the result of a round, apart from the local rounds."""
    return _recorded(args, _federation_fields())


def described_arguments(arguments: dict[str, Any], callbacks: Iterable[TrainerCallback]) -> dict[str, Any]:
    """
    What a trainer was given beside model, config and data: values, classes and digests of code.

    Args:
        arguments (`dict[str, Any]`):
            The keyword arguments.
        callbacks (`Iterable[TrainerCallback]`):
            All that are registered. Those of the libraries, which show and report, are left out, and those that say
            so: their class has `may_differ = True`.
    """
    own = [callback if isinstance(callback, type) else type(callback) for callback in callbacks]
    names = [
        qualified_name(kind)
        for kind in own
        if not kind.__module__.startswith(_OF_LIBRARIES) and not getattr(kind, "may_differ", False)
    ]
    given = {
        name: described(value)
        for name, value in sorted(arguments.items())
        if name not in _BY_OTHER_MEANS and not _is_nothing(value)
    }
    return given | ({"callbacks": sorted(names)} if names else {})


def _federation_fields() -> list[str]:
    theirs = {field.name for field in fields(TrainingArguments)}
    return [field.name for field in fields(FederationArguments) if field.name not in theirs]


def _recorded(args: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: described(getattr(args, name)) for name in names if name not in _LEFT_OUT and not is_secret(name)}


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(entry is None for entry in value))
