# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a policy compares with a run: for each of its fields, a sentence where the run asks for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_scl.foreign_files import short_repr

from .policy_fields import PolicyFields
from .run_request import RunRequest, is_digest


__all__ = ["CHECKS", "checked_later"]


def _base_models(policy: PolicyFields, request: RunRequest) -> list[str]:
    allowed = policy.base_models
    if allowed is None or request.has_base(allowed):
        return []
    name, digest = request.run.get("base_model"), request.run.get("base_digest")
    if request.is_known_later("base_digest") and any(is_digest(entry) for entry in allowed):
        return []
    return [
        f"`base_models`: the run is on {_told(name)} (digest {_told(digest)}), but the policy "
        f"allows {list(allowed)}. Ask for one of these, or add it to the policy."
    ]


def _trainers(policy: PolicyFields, request: RunRequest) -> list[str]:
    trainer = request.run.get("trainer")
    if policy.trainers is None or trainer in policy.trainers:
        return []
    return [
        f"`trainers`: the run uses the trainer {_told(trainer)}, but the policy allows {list(policy.trainers)}. Add "
        "it to the policy, or stay out of the run."
    ]


def _most_rounds(policy: PolicyFields, request: RunRequest) -> list[str]:
    return _at_most("most_rounds", policy.most_rounds, request.count("num_rounds"), "rounds", "`num_rounds`")


def _most_local_steps(policy: PolicyFields, request: RunRequest) -> list[str]:
    most = policy.most_local_steps
    if most is None:
        return []
    steps, how = request.local_steps()
    if steps is None:
        return [f"`most_local_steps`: the policy allows {most:,} local steps per round, but {how}"]
    if steps <= most:
        return []
    if request.has_epochs and not policy.may_leave.example_counts:  # the coordinator reads this
        return [
            f"`most_local_steps`: the run asks for more local steps per round than the {most:,} that the policy "
            "allows. Ask the coordinator for `max_steps`."
        ]
    return [
        f"`most_local_steps`: the run asks for {steps:,} local steps per round ({how}), but the policy allows "
        f"{most:,}. Ask the coordinator to lower `max_steps`, or raise the bound."
    ]


def _fewest_clients(policy: PolicyFields, request: RunRequest) -> list[str]:
    fewest = policy.fewest_clients_per_round
    if fewest is None:
        return []
    asked = {
        "clients_per_round": ("samples", request.count("num_sampled")),
        "min_clients": ("may end with the updates of", request.min_clients),
    }
    return [
        f"`fewest_clients_per_round`: a round {does} "
        f"{'an unknown number of' if number is None else number} clients (`{setting}`), but the policy demands "
        f"{fewest}. Ask the coordinator to raise `{setting}`, or lower the bound."
        for setting, (does, number) in asked.items()
        if number is None or number < fewest
    ]


def _largest_upload(policy: PolicyFields, request: RunRequest) -> list[str]:
    if request.is_known_later("upload_bytes"):
        return []
    size = request.count("upload_bytes")
    mib = None if size is None else size / 2**20
    return _at_most("largest_upload_mib", policy.largest_upload_mib, mib, "MiB per round", "`r` of the PEFT config")


def _aggregations(policy: PolicyFields, request: RunRequest) -> list[str]:
    aggregation = request.settings.get("aggregation")
    if policy.aggregations is None or aggregation in policy.aggregations:
        return []
    return [
        f"`aggregations`: the run aggregates by {_told(aggregation)}, but the policy allows "
        f"{list(policy.aggregations)}. Ask the coordinator to set `aggregation`, or add it to the policy."
    ]


def _requires(policy: PolicyFields, request: RunRequest) -> list[str]:
    return [
        f"`requires`: the policy requires {name!r}, which this version cannot offer, so it refuses every run. Leave "
        "it out of the policy, or wait for a version that can."
        for name in policy.requires or ()
    ]


def _example_counts(policy: PolicyFields, request: RunRequest) -> list[str]:
    if policy.may_leave.example_counts:
        return []
    sentences = []
    weights = request.run.get("weights")
    if weights != "uniform":
        sentences.append(
            f"`may_leave.example_counts`: the run weights clients by {_told(weights)}, but the policy lets no numbers "
            'of examples leave. Ask the coordinator for `aggregation_kwargs={"weights": "uniform"}`.'
        )
    if request.has_epochs:
        sentences.append(
            "`may_leave.example_counts`: the run has a local budget in epochs (`max_steps=-1`), so that the number of "
            "local steps tells the number of examples, which the policy does not let leave. Ask the coordinator for "
            "`max_steps`."
        )
    return sentences + _published("example_counts", request, "publish_client_metrics", "sizes of single clients")


def _label_counts(policy: PolicyFields, request: RunRequest) -> list[str]:
    if policy.may_leave.label_counts:
        return []
    column = request.settings.get("label_column")
    counted = [] if column is None else [
        f"`may_leave.label_counts`: the run counts the values of {_told(column)} (`label_column`), but the policy "
        "lets no counts of labels leave. Ask the coordinator to leave `label_column` out, or allow it."
    ]  # fmt: skip
    return counted + _published("label_counts", request, "publish_label_counts", "counts of labels by client")


def _metrics(policy: PolicyFields, request: RunRequest) -> list[str]:
    if policy.may_leave.metrics:
        return []
    return _published("metrics", request, "publish_client_metrics", "figures of single clients")


def _client_name(policy: PolicyFields, request: RunRequest) -> list[str]:
    if policy.may_leave.client_name:
        return []
    return _published("client_name", request, "publish_client_names", "names of clients")


def _needs(policy: PolicyFields, request: RunRequest) -> list[str]:
    needs = {"needs_signed": "signed", "needs_encrypted": "encrypted"}
    return [
        f"`{name}`: the packets of the run are not {kind} (`{kind}` is {_told(request.run.get(kind))}), but the "
        "policy demands it. Ask the coordinator for it, or take the demand back."
        for name, kind in needs.items()
        if getattr(policy, name) and not request.is_known_later(kind) and request.run.get(kind) is not True
    ]


def _trust_remote_code(policy: PolicyFields, request: RunRequest) -> list[str]:
    if policy.trust_remote_code or not request.runs_remote_code:
        return []
    return [
        "`trust_remote_code`: the run loads its base model with code that comes with it (`trust_remote_code=True`), "
        "but the policy allows none. Look at that code before you allow it, or ask for another base model."
    ]


CHECKS: tuple[Callable[[PolicyFields, RunRequest], list[str]], ...] = (
    _base_models,
    _trainers,
    _most_rounds,
    _most_local_steps,
    _fewest_clients,
    _largest_upload,
    _aggregations,
    _requires,
    _example_counts,
    _label_counts,
    _metrics,
    _client_name,
    _needs,
    _trust_remote_code,
)


def checked_later(policy: PolicyFields, request: RunRequest) -> list[str]:
    """The fields of a policy that cannot be compared with a plan yet."""
    base_models = policy.base_models or ()
    waits_for = {
        "base_models": "base_digest" if base_models and not request.has_base(base_models) else None,
        "largest_upload_mib": "upload_bytes" if policy.largest_upload_mib is not None else None,
        "needs_signed": "signed" if policy.needs_signed else None,
        "needs_encrypted": "encrypted" if policy.needs_encrypted else None,
    }
    return [f"`{field}`" for field, name in waits_for.items() if name is not None and request.is_known_later(name)]


def _at_most(name: str, most: float | None, asked: float | None, unit: str, setting: str) -> list[str]:
    if most is None or (asked is not None and asked <= most):
        return []
    does = f"does not say its {unit}" if asked is None else f"asks for {_number(asked)} {unit}"
    return [
        f"`{name}`: the run {does}, but the policy allows {_number(most)}. Ask the coordinator to lower "
        f"{setting}, or raise the bound."
    ]


def _published(name: str, request: RunRequest, setting: str, what: str) -> list[str]:
    if not request.is_set(setting):
        return []
    return [
        f"`may_leave.{name}`: the run publishes {what} (`{setting}=True`), but the policy does not allow it. Ask the "
        f"coordinator to leave `{setting}` out, or allow it."
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _told(value: Any) -> str:
    """What a coordinator said, which may be anything, or nothing."""
    return "(not stated)" if value is None else short_repr(value)
