# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What of the record and the log of a run is published: a list of what goes out, everything else stays. The local files
keep it all.

Without an option no client is named, and no figure is one client's: a round in which a single client counted has no
loss, bytes and seconds, an evaluation on the held-out data of a single client no metrics, a federation of one client
no size. A metric that a single client has a number for stays too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from .figures import FIGURES_WITHHELD, is_shown


__all__ = ["Openings", "clients_between", "published_log", "published_record"]


_FIELDS = (
    "format", "base_model", "base_digest", "peft_type", "num_trainable_parameters", "num_local_parameters",
    "aggregation", "peft_config", "seed", "num_rounds", "num_sampled", "partition", "sparse_stage",
)  # fmt: skip
_SETTINGS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "round_lr_scheduler_type", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel", "data_seed", "bf16", "fp16", "tf32",
    "loss_type", "completion_only_loss", "assistant_only_loss", "router_aux_loss_coef", "max_length",
    "truncation_mode", "packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "shuffle_dataset",
    "eos_token", "reference", "beta", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "label_smoothing", "use_weighting", "discopop_tau", "disable_dropout", "center_rewards_coefficient",
)  # fmt: skip
_FEDERATION = (
    "aggregation_kwargs", "tensor_roles", "min_clients", "server_optimizer", "server_lr", "server_optimizer_kwargs",
    "local_objective", "local_objective_kwargs", "keep_optimizer_state",
)  # fmt: skip
_ROUND = ("round", "learning_rate", "base_change_bytes")
# sums and means over the clients of a round
_OVER_CLIENTS = ("train_loss", "bytes_up", "bytes_down", "seconds")
_CLIENT_METRICS = ("num_examples", "train_loss", "num_steps", "seconds", "bytes_up", "bytes_down")
# of `trainer_state.json`
_STATE = ("epoch", "global_step", "max_steps", "num_train_epochs")
_LOG = ("step", "epoch", "learning_rate")
_LOG_OVER_CLIENTS = re.compile(r"loss|bytes_(up|down)|seconds_[a-z]+")


class Openings(NamedTuple):
    """What the user lets out: see `publish_client_names` and the like of [`FederatedConfig`]."""

    client_names: bool = False
    client_metrics: bool = False
    label_counts: bool = False


CLOSED = Openings()


def published_record(record: Mapping[str, Any], openings: Openings = CLOSED) -> dict[str, Any]:
    """
    The record as it is published, in the format of the whole one.

    Clients that are not named are called by their number, in a round without metrics by that within the round.

    Args:
        record (`dict[str, Any]`):
            The content of `federation.json`.
        openings ([`Openings`], *optional*):
            What is let out.
    """
    clients = record["clients"]
    shown = _names(clients, openings)
    is_whole = openings.client_names and openings.client_metrics
    federation = _chosen(record.get("federation", {}), _FEDERATION)
    if is_whole and "client_settings" in record.get("federation", {}):
        federation["client_settings"] = record["federation"]["client_settings"]
    sizes = [client["num_examples"] for client in clients.values()]
    return {
        **_chosen(record, _FIELDS),
        "published": openings._asdict(),
        "settings": _chosen(record.get("settings", {}), _SETTINGS),
        "federation": federation,
        "num_examples": sum(sizes) if None not in sizes and (openings.client_metrics or len(sizes) > 1) else None,
        "label_column": record["label_column"] if openings.label_counts else None,
        "clients": {
            shown[name]: {
                "num_examples": client["num_examples"] if openings.client_metrics else None,
                "composition": client["composition"] if openings.label_counts else None,
            }
            for name, client in clients.items()
        },
        "side_metrics": [
            name for name in record.get("side_metrics", []) if is_whole or not _names_a_client(name, clients)
        ],
        "start": {"eval": _evaluation(record, record["start"].get("eval"), _of_one_at_start(record), openings)},
        "rounds": [_round(record, entry, shown, openings) for entry in record["rounds"]],
    }


def published_log(state: Mapping[str, Any], record: Mapping[str, Any], openings: Openings = CLOSED) -> dict[str, Any]:
    """
    The content of `trainer_state.json` as it is published.

    Args:
        state (`dict[str, Any]`):
            The whole content.
        record (`dict[str, Any]`):
            The content of `federation.json`.
        openings ([`Openings`], *optional*):
            What is let out.
    """
    shown = _names(record["clients"], openings)
    rounds = {entry["round"]: entry for entry in record["rounds"]}
    history = []
    for entry in state["log_history"]:
        round = rounds.get(entry.get("step"), {"clients": {}, "client_eval": None})
        kept = _chosen(entry, _LOG)
        kept |= {
            key: entry[key]
            for key in entry
            if _LOG_OVER_CLIENTS.fullmatch(key) and (openings.client_metrics or _is_of_many(round, key))
        }
        if openings.client_metrics:
            kept |= _client_figures(entry, shown)
        evaluated = {key: value for key, value in entry.items() if key.startswith("eval_")}
        is_of_one = _of_one_at_start(record) if entry.get("step") == 0 else _of_one(round)
        kept |= _evaluation(record, evaluated, is_of_one, openings) or {}
        history.append(kept)
    return {**_chosen(state, _STATE), "log_history": history}


def clients_between(record: Mapping[str, Any], after: int) -> set[str]:
    """
    Clients whose updates are in the difference between the model after round `after` and that after the last one.
    """
    return {client for entry in record["rounds"] if entry["round"] > after for client in entry["clients"]}


def _round(
    record: Mapping[str, Any], entry: Mapping[str, Any], shown: Mapping[str, str], openings: Openings
) -> dict[str, Any]:
    if openings.client_metrics:
        clients = {shown[name]: _chosen(figures, _CLIENT_METRICS) for name, figures in entry["clients"].items()}
    elif openings.client_names:
        clients = {name: {} for name in entry["clients"]}
    else:
        clients = {_number(index): {} for index in range(len(entry["clients"]))}
    evaluations = None
    if openings.client_metrics and entry.get("client_eval"):
        evaluations = {shown[name]: _numbers(figures) for name, figures in entry["client_eval"].items()}
    is_whole = openings.client_names and openings.client_metrics
    return {
        **_chosen(entry, _ROUND),
        **{
            key: entry.get(key) if openings.client_metrics or _is_of_many(entry, key) else None
            for key in _OVER_CLIENTS
        },
        "clients": clients,
        "refused": dict(entry.get("refused", {})) if is_whole else {},
        "eval": _evaluation(record, entry.get("eval"), _of_one(entry), openings),
        "client_eval": evaluations,
    }


def _names(clients: Iterable[str], openings: Openings) -> dict[str, str]:
    """What clients are called in public, by their names."""
    return {name: name if openings.client_names else _number(index) for index, name in enumerate(clients)}


def _number(index: int) -> str:
    return f"client {index + 1}"


def _evaluation(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    is_of_one: Callable[[str], bool],
    openings: Openings,
) -> dict[str, Any] | None:
    """
    The figures of an evaluation; those of one client, or of a held-out set that is called like one, only if these are
    let out.
    """
    if metrics is None:
        return None
    shown = {key: value for key, value in _numbers(metrics).items() if openings.client_metrics or not is_of_one(key)}
    if metrics and not shown:
        return None
    is_whole = openings.client_names and openings.client_metrics
    return {key: value for key, value in shown.items() if is_whole or not _names_a_client(key, record["clients"])}


def _client_figures(entry: Mapping[str, Any], shown: Mapping[str, str]) -> dict[str, Any]:
    """`clients/<name>/<figure>` of a log entry."""
    figures = {}
    for key, value in _numbers(entry).items():
        name, _, figure = key.removeprefix("clients/").rpartition("/")
        if key.startswith("clients/") and name in shown:
            figures[f"clients/{shown[name]}/{figure}"] = value
    return figures


def _names_a_client(key: str, clients: Collection[str]) -> bool:
    """
    Whether the name of a metric has that of a client in it, as that of a held-out set which is called so:
    `eval_<client>_loss`.
    """
    parts = key.split("_")
    return any("_".join(parts[start:end]) in clients for end in range(len(parts) + 1) for start in range(1, end))


def _is_of_many(entry: Mapping[str, Any], figure: str) -> bool:
    """Whether a figure of a round, or of its log, is a sum or a mean over several clients, as far as they tell it."""
    clients = entry["clients"].values()
    if figure in ("loss", "train_loss"):
        clients = [figures for figures in clients if FIGURES_WITHHELD not in figures]
    return len(clients) > 1


def _of_one(entry: Mapping[str, Any]) -> Callable[[str], bool]:
    """Of an evaluation by client: tells the metrics that are those of a single client, as the others have none."""
    by_client = entry.get("client_eval")
    if by_client is None:
        return lambda key: False
    is_alone = sum(map(bool, by_client.values())) == 1
    counts = entry.get("eval_clients") or {}
    return lambda key: is_alone or counts.get(key) == 1


def _of_one_at_start(record: Mapping[str, Any]) -> Callable[[str], bool]:
    """As `_of_one` for the evaluation before the first round, of which the record says nothing: as in any round."""
    rounds = [_of_one(entry) for entry in record["rounds"]]
    is_alone = len(record["clients"]) == 1
    return lambda key: is_alone or any(is_of_one(key) for is_of_one in rounds)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if is_shown(value)}


def _chosen(source: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: source[name] for name in names if name in source}
