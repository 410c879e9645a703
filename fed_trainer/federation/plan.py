# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the settings imply for both sides: whose tensors are whose, the method, the local objective, what clients do
differently.

The server and every client build it from the same settings and the same facts of the model, and then agree
without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..config import FederationArguments, given
from ..methods.aggregation import METHODS
from ..methods.aggregation.base import Aggregator
from ..methods.aggregation.limits import MOST_STEPS
from ..methods.codecs import CODECS, DtypeStep, Pipeline
from ..methods.objectives import LOCAL_OBJECTIVES, LocalObjective
from ..methods.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from ..state.adapter_state import AdapterState
from ..state.factors import FactorPair, truncate_ranks
from ..state.roles import TensorRoles
from .client_settings import ClientSettings


__all__ = ["ModelFacts", "Plan", "user_roles"]

Part = TypeVar("Part")

# arguments that are not the user's to give
NOT_OPTIONS = {"self", "pairs", "partial", "aggregator", "num_clients", "lr"}


@dataclass(frozen=True)
class ModelFacts:
    """
    What both sides know of the model, and neither holds.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter that the method works on, if it works on some.
        buffers (`Collection[str]`):
            Names of the tensors that a forward pass in training changes: running statistics and counts.
        base_dtypes (`Mapping[str, tuple[torch.dtype, ...]]`):
            By module of a pair the dtype of its base weight, if it is one of floating-point numbers; a quantised
            weight takes no addition.
        base_digest (`str`, *optional*):
            [`base_digest`] of the base model, which clients that send one must agree with.
    """

    pairs: Sequence[FactorPair] = ()
    buffers: Collection[str] = frozenset()
    base_dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    base_digest: str | None = None


class Plan:
    """
    What the settings imply for both sides.

    Args:
        args ([`FederationArguments`]):
            The settings.
        facts ([`ModelFacts`]):
            What is known of the model.
        state (`dict[str, torch.Tensor]`):
            What is trained, before the first round; looked at, not kept.
        settings (`dict[str, ClientSettings]`):
            What single clients do differently.
        num_clients, num_sampled (`int`):
            Clients in all and per round.

    Raises:
        ValueError: For a combination of settings, or of settings and adapter, that cannot work.
    """

    def __init__(
        self,
        args: FederationArguments,
        facts: ModelFacts,
        state: AdapterState,
        settings: Mapping[str, ClientSettings],
        num_clients: int,
        num_sampled: int,
    ) -> None:
        self.method = METHODS[args.aggregation]
        self.facts, self.pairs, self.buffers = facts, list(facts.pairs), facts.buffers
        self.settings, self.num_clients, self.min_clients = settings, num_clients, args.min_clients
        self.keeps_optimizer = args.keep_optimizer_state
        self._user_roles = user_roles(args)
        self.most_steps = _most_steps(args, settings)
        self._check_settings(args.aggregation, state)
        if len(settings) == num_clients and self.method.takes_ranks:
            largest = self.largest_rank(state)
            self.method.rule.check_ranks([client.r or largest for client in settings.values()], largest)

        self.objective = _objective(args, self.pairs, num_clients)
        """The clients' half of the local objective, if there is one."""
        self.partial = any(client.layers_to_transform is not None for client in settings.values())
        options = self._rule_options(args)
        self.rule: Aggregator = _built("aggregation_kwargs", lambda: self.method.build(self.pairs, **options))
        self.counts_tokens = "tokens" in (options.get("weights"), options.get("weighting"))
        self.optimizer = _server_optimizer(args, self.objective, num_clients)
        self.up, self.down = self._pipelines(args, num_sampled < num_clients)
        self._check_stages(args)
        if self.objective is not None:
            self._check_objective(args, self.objective)
        needed = max(args.min_clients, self.rule.min_updates)
        if num_sampled < needed:
            raise ValueError(
                f"A round needs {needed} usable updates (`min_clients={args.min_clients}`, and "
                f"{self.rule.min_updates} for {args.aggregation!r}), but only {num_sampled} clients are sampled "
                "per round. Raise `clients_per_round`."
            )

    def _rule_options(self, args: FederationArguments) -> dict[str, Any]:
        rule = self.method.rule
        options: dict[str, Any] = {"seed": args.seed} if _takes(rule, "seed") else {}
        if self.partial:
            options["partial"] = True
        options |= rule.options_from(args)
        options |= _options("aggregation_kwargs", args.aggregation, rule, args)
        if self.objective is not None and self.objective.uniform:
            options["weights"] = "uniform"
        return options

    def _pipelines(self, args: FederationArguments, some_are_sampled: bool) -> tuple[Pipeline, Pipeline]:
        """What an update goes through, and what the server sends."""
        steps = []
        for name, options in given(args, "codecs").items():
            if name not in CODECS:
                raise ValueError(f"`codecs` names {name!r}, which there is not. There are {sorted(CODECS)}.")
            if not isinstance(options, dict | None):
                raise ValueError(
                    f"`codecs` should have the options of {name!r} as a dictionary, such as "
                    f"`{{{name!r}: {{...}}}}`, but the value passed is {options!r}."
                )
            steps.append(_built("codecs", functools.partial(CODECS[name], **(options or {}))))
        dtype = args.wire_dtype
        up = Pipeline([*steps, *([] if dtype is None else [DtypeStep(dtype)])])
        needs_exact = self.objective is not None and self.objective.needs_exact_updates
        up.check(f"`local_objective={args.local_objective!r}`" if needs_exact else None, some_are_sampled)
        return up, Pipeline([] if dtype is None else [DtypeStep(dtype, rounding="nearest")])

    def _check_settings(self, aggregation: str, state: AdapterState) -> None:
        roles = self.roles(1)
        shared = [key for key in state if roles.role(key) == "shared"]
        for client, own in self.settings.items():
            if own.r is not None:
                self._check_rank(aggregation, client, own.r, state)
            if own.layers_to_transform is not None and not self.method.takes_layers:
                names = [name for name, method in METHODS.items() if method.takes_layers]
                raise ValueError(
                    f"`client_settings` lets client {client!r} train the layers {list(own.layers_to_transform)}, but "
                    f"{aggregation!r} compares or weights whole updates. Use one of {names}, or train all layers "
                    "everywhere."
                )
            if not any(own.trains(key) for key in shared):
                raise ValueError(
                    f"Client {client!r} would send nothing: no tensor of the layers "
                    f"{list(own.layers_to_transform or ())} is shared. Change `client_settings` or `tensor_roles`."
                )

    def _check_rank(self, aggregation: str, client: str, rank: int, state: AdapterState) -> None:
        if not self.method.takes_ranks:
            names = [name for name, method in METHODS.items() if method.takes_ranks]
            raise ValueError(
                f"`client_settings` gives client {client!r} the rank {rank}, but {aggregation!r} combines adapters "
                f"of one rank. Use one of {names}, or leave `r` out."
            )
        largest = self.largest_rank(state)
        if rank > largest:
            raise ValueError(
                f"`client_settings` gives client {client!r} the rank {rank}, but the PEFT config has the rank "
                f"{largest}, which has to be the largest of all clients. Raise it there."
            )
        truncate_ranks(state, self.pairs, rank)  # refuses factors that cannot be cut

    def _check_stages(self, args: FederationArguments) -> None:
        if self.sparse_rounds >= args.num_rounds:
            raise ValueError(
                f"`sparse_rounds={self.sparse_rounds}` of {args.num_rounds} rounds leaves none for the LoRA, which "
                f"is what {args.aggregation!r} publishes. Lower it, or raise `num_rounds`."
            )
        if self.sparse_rounds and (role := self.roles(1).role(f"{self.pairs[0].module}.sparse_values")) != "shared":
            raise ValueError(
                f"By `tensor_roles` what no pattern matches is {role}, but the sparse change that "
                f"{args.aggregation!r} trains first has to be shared. Leave `default` at 'shared', and name the "
                "tensors by patterns."
            )

    def _check_objective(self, args: FederationArguments, objective: LocalObjective) -> None:
        if objective.is_personal and self.sparse_rounds:
            reason = (
                f"keeps a model of every client over all rounds, but {args.aggregation!r} trains other tensors in "
                "its second stage"
            )
        elif objective.follows_factors and self.method.adds_to_base:
            reason = (
                "goes on with the adapter of a client from the round before, but "
                f"{args.aggregation!r} moves a part of it into the base in every round"
            )
        elif self.partial and objective.needs_all_tensors:
            reason = (
                "is defined over all tensors of every client, but `layers_to_transform` of `client_settings` "
                "leaves some out"
            )
        else:
            return
        raise ValueError(
            f"`local_objective={args.local_objective!r}` {reason}. Leave one of the two out, or use 'fedprox'."
        )

    # Whose tensors are whose

    def roles(self, round: int) -> TensorRoles:
        """The roles of the tensors in a round: the method's and the user's."""
        return self.method.roles(round).joined(self._user_roles)

    def shared_keys(self, keys: Collection[str], round: int) -> set[str]:
        """Names of the tensors that are shared in a round."""
        roles = self.roles(round)
        return {key for key in keys if roles.role(key) == "shared"}

    def local_keys(self, keys: Collection[str]) -> set[str]:
        """Names of the tensors that stay with the clients."""
        roles = self.roles(1)  # only the frozen ones differ from round to round
        return {key for key in keys if roles.role(key) == "local"}

    def clients_keep(self, keys: Collection[str]) -> bool:
        """Whether a client whose update has counted has kept something."""
        objective = self.objective
        is_kept = objective is not None and (objective.is_personal or objective.keeps_client_state)
        return self.keeps_optimizer or is_kept or bool(self.local_keys(keys))

    def trained_keys(self, keys: Collection[str], round: int, settings: ClientSettings) -> set[str]:
        """Names of the tensors that a client with these settings trains in a round."""
        roles = self.roles(round)
        return {key for key in keys if roles.role(key) != "frozen" and settings.trains(key)}

    @property
    def drawn_keys(self) -> set[str]:
        """Names of the tensors that every machine draws anew in each round, so that nobody sends them down."""
        if not self.method.restarts:
            return set()
        return {key for pair in self.pairs for key in (pair.key_A, pair.key_B)}

    @property
    def sparse_rounds(self) -> int:
        """Rounds of a first stage that trains a sparse change of base weights; 0 for most methods."""
        return self.rule.sparse_rounds

    # Clients that differ

    def settings_of(self, client: str, rank: int | None = None) -> ClientSettings:
        """
        What a client does differently; `rank` is the one that it has by now, if the local objective has changed it.
        """
        settings = self.settings.get(client, ClientSettings())
        return settings if rank is None else replace(settings, r=rank)

    def cut_to_rank(self, shared: AdapterState, settings: ClientSettings) -> AdapterState:
        """Shared tensors in the shapes that a client with these settings is sent, and sends."""
        return shared if settings.r is None else truncate_ranks(shared, self.pairs, settings.r)

    def asked_of(self, sent: AdapterState, settings: ClientSettings) -> AdapterState:
        """Of the tensors that a client was sent, those that it is to send an update of."""
        return {key: tensor for key, tensor in sent.items() if settings.trains(key)}

    def largest_rank(self, state: AdapterState) -> int:
        """The rank of the adapter."""
        return max(len(state[pair.key_A]) for pair in self.pairs)


def user_roles(args: FederationArguments) -> TensorRoles:
    """
    The roles that the user has given.

    Raises:
        ValueError: For a field that [`TensorRoles`] does not have.
    """
    fields = given(args, "tensor_roles")
    names = set(inspect.signature(TensorRoles).parameters)
    if not set(fields) <= names:
        raise ValueError(f"`tensor_roles` has {sorted(set(fields) - names)}, but takes {sorted(names)}.")
    patterns: dict[str, Any] = {
        name: (value,) if name != "default" and isinstance(value, str) else value for name, value in fields.items()
    }
    return TensorRoles(**patterns)


def _most_steps(args: FederationArguments, settings: Mapping[str, ClientSettings]) -> int:
    """Local steps that no client of the run exceeds."""
    if args.max_steps <= 0:
        return MOST_STEPS
    return max([args.max_steps, *(client.max_steps for client in settings.values() if client.max_steps is not None)])


def _objective(args: FederationArguments, pairs: Sequence[FactorPair], num_clients: int) -> LocalObjective | None:
    if args.local_objective is None:
        if args.local_objective_kwargs:
            raise ValueError(
                f"`local_objective_kwargs` is {args.local_objective_kwargs}, but there is no `local_objective` for "
                f"them. Name one of {sorted(LOCAL_OBJECTIVES)}."
            )
        return None
    kind = LOCAL_OBJECTIVES[args.local_objective]
    options = _options("local_objective_kwargs", args.local_objective, kind, args)
    if _takes(kind, "num_clients"):
        options["num_clients"] = num_clients
    if kind.changes_ranks and not METHODS[args.aggregation].takes_ranks:
        names = [name for name, method in METHODS.items() if method.takes_ranks]
        raise ValueError(
            f"`local_objective={args.local_objective!r}` gives every client a rank of its own, but "
            f"`aggregation` is {args.aggregation!r}. Use one of {names}."
        )
    if _takes(kind, "pairs"):
        options["pairs"] = pairs
    objective = _built("local_objective_kwargs", lambda: kind(**options))
    objective.check(args)
    if objective.uniform:
        _check_plain_mean(args)
    return objective


def _check_plain_mean(args: FederationArguments) -> None:
    weights = given(args, "aggregation_kwargs").get("weights", "uniform")
    what = (
        f"`local_objective={args.local_objective!r}` is defined for the plain mean over clients, all weighted "
        "alike, but"
    )
    if weights != "uniform":
        raise ValueError(f"{what} `aggregation_kwargs` has `weights={weights!r}`. Leave it out.")
    if not METHODS[args.aggregation].is_mean:
        names = [name for name, method in METHODS.items() if method.is_mean]
        raise ValueError(f"{what} `aggregation` is {args.aggregation!r}. Use one of {names}.")


def _server_optimizer(
    args: FederationArguments, objective: LocalObjective | None, num_clients: int
) -> ServerOptimizer:
    is_plain = args.server_optimizer == "sgd" and args.server_lr in (None, 1) and not args.server_optimizer_kwargs
    if not METHODS[args.aggregation].takes_server_optimizer and not is_plain:
        raise ValueError(
            f"`server_optimizer={args.server_optimizer!r}` with `server_lr={args.server_lr}` cannot follow "
            f"{args.aggregation!r}: it sets the factors to new values, which are no direction to step along. Leave "
            "the server optimiser out, or use 'fedavg'."
        )
    own = None if objective is None else objective.server_optimizer(num_clients)
    if own is not None:
        if not is_plain:
            raise ValueError(
                f"`local_objective={args.local_objective!r}` has a server step of its own, but "
                f"`server_optimizer={args.server_optimizer!r}` with `server_lr={args.server_lr}` was given. Leave "
                "both out."
            )
        return own
    kind = SERVER_OPTIMIZERS[args.server_optimizer]
    options = _options("server_optimizer_kwargs", args.server_optimizer, kind, args)
    if args.server_lr is not None:
        options["lr"] = args.server_lr
    return _built("server_optimizer_kwargs", lambda: kind(**options))


def _options(name_of_field: str, name: str, kind: Callable[..., Any], args: FederationArguments) -> dict[str, Any]:
    """The user's options of a part, after refusing those it does not have."""
    names = sorted(set(inspect.signature(kind).parameters) - NOT_OPTIONS)
    options = given(args, name_of_field)
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(
            f"`{name_of_field}` has {unknown}, which {name!r} does not take. It takes {names or 'no options'}."
        )
    return dict(options)


def _built(name_of_field: str, build: Callable[[], Part]) -> Part:
    try:
        return build()
    except TypeError as error:  # an option without a default
        raise ValueError(f"`{name_of_field}` does not suffice: {error}.") from error


def _takes(kind: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(kind).parameters
