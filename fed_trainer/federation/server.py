# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The server's side of a round, without a model: what is shared, who counts, the rule, the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers.training_args import OptimizerNames

from ..client.live.state import LiveState
from ..config import FederationArguments, given
from ..methods.aggregation import METHODS, ClientUpdate, FedAvg, SLoRA
from ..methods.aggregation.limits import MOST_STEPS, largest_product, product_limit, value_limits
from ..methods.objectives import LOCAL_OBJECTIVES, FedDynRegularizer, LocalObjective, RankPruning
from ..methods.server_optimizers import SERVER_OPTIMIZERS, FedDyn, ServerOptimizer
from ..state.adapter_state import AdapterState
from ..state.factors import FactorPair, truncate_ranks
from ..state.low_rank import LowRank
from ..state.processes import from_first, is_first
from ..state.roles import TensorRoles
from ..trainers.refusals.adapters import check_adapter
from .broken_state import WAY_BACK, BrokenStateError
from .client_settings import ClientSettings
from .validation import InvalidUpdateError, first_not_finite, require_clients, validated


__all__ = ["Server", "freeze_for_good"]

Part = TypeVar("Part")

# arguments that are not the user's to give
NOT_OPTIONS = {"self", "pairs", "partial", "aggregator", "num_clients", "lr"}


class Server:
    """
    What the server does in a round: `begin`, `receive` once per client, `finish`.

    Args:
        args ([`FederationArguments`]):
            The settings.
        model (`nn.Module`):
            The model before its first round; looked at, not kept.
        live ([`LiveState`]):
            Its tensors.
        settings (`dict[str, ClientSettings]`):
            What single clients do differently.
        num_clients, num_sampled (`int`):
            Clients in all and per round.
        base_digest (`str`, *optional*):
            Digest of the base model, which clients that send one must agree with.

    Raises:
        ValueError: For a combination of settings, or of settings and adapter, that cannot work.
    """

    def __init__(
        self,
        args: FederationArguments,
        model: nn.Module,
        live: LiveState,
        settings: Mapping[str, ClientSettings],
        num_clients: int,
        num_sampled: int,
        base_digest: str | None = None,
    ) -> None:
        self.method = METHODS[args.aggregation]
        self.pairs = _pairs(args.aggregation, model)
        self.min_clients = args.min_clients
        self.base_digest = base_digest
        self._user_roles = _user_roles(args)
        self._buffers = live.buffers
        self._most_steps = _most_steps(args, settings)
        self._base_dtypes = _base_dtypes(model, self.pairs)
        state = live.read()
        self._check_settings(args.aggregation, settings, state)
        if args.aggregation == "hetlora":
            _check_largest_rank(settings, num_clients, self._largest_rank(state))

        self.objective = _objective(args, self.pairs, num_clients)
        self.partial = any(client.layers_to_transform is not None for client in settings.values())
        options: dict[str, Any] = {"seed": args.seed} if _takes(self.method.rule, "seed") else {}
        if self.partial:
            options["partial"] = True
        if args.aggregation == "fednova":
            options |= _momentum(args)
        options |= _options("aggregation_kwargs", args.aggregation, self.method.rule, args)
        if self.objective is not None and self.objective.uniform:
            options["weights"] = "uniform"
        self.rule = _built("aggregation_kwargs", lambda: self.method.build(self.pairs, **options))
        self.counts_tokens = "tokens" in (options.get("weights"), options.get("weighting"))
        self.optimizer = _server_optimizer(args, self.objective, num_clients)
        if self.sparse_rounds >= args.num_rounds:
            raise ValueError(
                f"`sparse_rounds={self.sparse_rounds}` of {args.num_rounds} rounds leaves none for the LoRA, which is what 'slora' "
                "publishes. Lower it, or raise `num_rounds`."
            )
        if self.sparse_rounds and (role := self.roles(1).role(f"{self.pairs[0].module}.sparse_values")) != "shared":
            raise ValueError(
                f"By `tensor_roles` what no pattern matches is {role}, but the sparse change that 'slora' trains first has to be shared. "
                "Leave `default` at 'shared', and name the tensors by patterns."
            )
        if self.objective is not None:
            self._check_objective(args, self.objective)
        needed = max(args.min_clients, self.rule.min_updates)
        if num_sampled < needed:
            raise ValueError(
                f"A round needs {needed} usable updates (`min_clients={args.min_clients}`, and {self.rule.min_updates} for "
                f"{args.aggregation!r}), but only {num_sampled} clients are sampled per round. Raise `clients_per_round`."
            )

    def _check_settings(self, aggregation: str, settings: Mapping[str, ClientSettings], state: AdapterState) -> None:
        roles = self.roles(1)
        shared = [key for key in state if roles.role(key) == "shared"]
        for client, own in settings.items():
            if own.r is not None:
                if not self.method.takes_ranks:
                    names = [name for name, method in METHODS.items() if method.takes_ranks]
                    raise ValueError(
                        f"`client_settings` gives client {client!r} the rank {own.r}, but {aggregation!r} combines adapters of one "
                        f"rank. Use one of {names}, or leave `r` out."
                    )
                largest = self._largest_rank(state)
                if own.r > largest:
                    raise ValueError(
                        f"`client_settings` gives client {client!r} the rank {own.r}, but the PEFT config has the rank {largest}, "
                        "which has to be the largest of all clients. Raise it there."
                    )
                truncate_ranks(state, self.pairs, own.r)  # refuses factors that cannot be cut
            if own.layers_to_transform is not None and not self.method.takes_layers:
                names = [name for name, method in METHODS.items() if method.takes_layers]
                raise ValueError(
                    f"`client_settings` lets client {client!r} train the layers {list(own.layers_to_transform)}, but "
                    f"{aggregation!r} compares or weights whole updates. Use one of {names}, or train all layers everywhere."
                )
            if not any(own.trains(key) for key in shared):
                raise ValueError(
                    f"Client {client!r} would send nothing: no tensor of the layers {list(own.layers_to_transform or ())} is shared. Change "
                    "`client_settings` or `tensor_roles`."
                )

    def _check_objective(self, args: FederationArguments, objective: LocalObjective) -> None:
        follows_factors = objective.is_personal or isinstance(objective, RankPruning)
        if objective.is_personal and self.sparse_rounds:
            reason = (
                "keeps a model of every client over all rounds, but 'slora' trains other tensors in its second stage"
            )
        elif follows_factors and self.method.adds_to_base:
            reason = (
                "goes on with the adapter of a client from the round before, but "
                f"{args.aggregation!r} moves a part of it into the base in every round"
            )
        elif self.partial and isinstance(objective, (FedDynRegularizer, RankPruning)):
            reason = "is defined over all tensors of every client, but `layers_to_transform` of `client_settings` leaves some out"
        else:
            return
        raise ValueError(
            f"`local_objective={args.local_objective!r}` {reason}. Leave one of the two out, or use 'fedprox'."
        )

    # Roles

    def roles(self, round: int) -> TensorRoles:
        """The roles of the tensors in a round: the method's and the user's."""
        return self.method.roles(round).joined(self._user_roles)

    def local_keys(self, state: AdapterState) -> set[str]:
        """Names of the tensors that stay with the clients."""
        roles = self.roles(1)  # only the frozen ones differ from round to round
        return {key for key in state if roles.role(key) == "local"}

    def trained_keys(self, state: AdapterState, round: int, settings: ClientSettings) -> set[str]:
        """Names of the tensors that a client with these settings trains in a round."""
        roles = self.roles(round)
        return {key for key in state if roles.role(key) != "frozen" and settings.trains(key)}

    @property
    def drawn_keys(self) -> set[str]:
        """Names of the tensors that every machine draws anew in each round, so that nobody sends them down."""
        if not self.method.restarts:
            return set()
        return {key for pair in self.pairs for key in (pair.key_A, pair.key_B)}

    @property
    def sparse_rounds(self) -> int:
        """Rounds of the first stage of SLoRA; 0 for other methods."""
        return self.rule.sparse_rounds if isinstance(self.rule, SLoRA) else 0

    # A round

    def begin(self, state: AdapterState, round: int, sampled: Collection[str] | None = None) -> None:
        """
        Start a round.

        Args:
            state (`dict[str, torch.Tensor]`):
                The global state: all that is trained, whatever its role.
            round (`int`):
                Number of the round, from 1.
            sampled (`Collection[str]`, *optional*):
                Clients of the round; an update of another one is refused. Any if not given.
        """
        self._shared_in = {number: self._shared_keys(state, number) for number in range(max(1, round - 2), round + 1)}
        self._round, self.state = round, state
        self._sampled = None if sampled is None else set(sampled)
        self._faulty: set[str] = set()  # clients whose update was refused
        self._shared = {key: tensor for key, tensor in state.items() if key in self._shared_in[round]}
        self.rule.begin(self._shared, round)
        self._limits = value_limits(self._shared, self.rule.largest_value(self._shared), self._buffers)
        self._product_limits = self._limits_of_products()
        self.taken: list[str] = []
        self.refused: dict[str, str] = {}

    def sent_to(self, settings: ClientSettings) -> AdapterState:
        """
        What a client with these settings gets from the server: the shared tensors, cut to its rank. Those of layers that it does
        not train too: it computes with them.
        """
        return self._shared if settings.r is None else truncate_ranks(self._shared, self.pairs, settings.r)

    def changed_since(self, round: int | None) -> set[str]:
        """
        Names of the tensors that have changed since a client came to round number `round`; for a client that has not
        been here (`None`) all that is or was shared. Roles repeat every two rounds at most.
        """
        first = 1 if round is None else round
        now = self._shared_in[self._round] if round is None else set()
        return now.union(*(keys for number, keys in self._shared_in.items() if first <= number < self._round))

    def _shared_keys(self, state: AdapterState, round: int) -> set[str]:
        roles = self.roles(round)
        return {key for key in state if roles.role(key) == "shared"}

    def asked_of(self, settings: ClientSettings) -> AdapterState:
        """What a client with these settings is to send an update of, as it has been sent."""
        return {key: tensor for key, tensor in self.sent_to(settings).items() if settings.trains(key)}

    def start_of(self, settings: ClientSettings) -> AdapterState:
        """The shared tensors as the live model takes them: of full shape, with zeros beyond the client's rank."""
        if settings.r is None:
            return self._shared
        return truncate_ranks(self._shared, self.pairs, settings.r, pad=True)

    def first_memory(self, settings: ClientSettings) -> AdapterState | None:
        """What the local objective is told of a client that it has not seen."""
        if not isinstance(self.objective, RankPruning):
            return None
        return {"rank": torch.tensor(settings.r or self._largest_rank(self._shared))}

    def _largest_rank(self, state: AdapterState) -> int:
        return max(len(state[pair.key_A]) for pair in self.pairs)

    def cut(self, delta: AdapterState, asked: AdapterState) -> AdapterState:
        """The entries of a delta of full shape that a client is to send."""
        return {
            key: delta[key][tuple(slice(size) for size in tensor.shape)].contiguous() for key, tensor in asked.items()
        }

    def receive(self, update: ClientUpdate, asked: AdapterState) -> str | None:
        """
        Take an update into account. Whatever came in, nothing is raised.

        Args:
            update ([`ClientUpdate`]):
                What came in.
            asked (`dict[str, torch.Tensor]`):
                `asked_of` the client.

        Returns:
            `str` or `None`: why it is left out, if it is.
        """
        sends = {} if self.objective is None else self.objective.sends
        try:
            update = validated(
                update,
                asked,
                self.taken,
                self.base_digest,
                sampled=self._sampled,
                limits=self._limits,
                most_steps=self._most_steps,
                sends=sends,
            )
            trained = {key: tensor for key, tensor in update.delta.items() if key not in self._buffers}
            if (fault := self._fault_of(update, trained)) is not None:
                raise InvalidUpdateError(update.client, fault)
        except InvalidUpdateError as error:
            client, is_known = error.client, self._sampled is None or error.client in self._sampled
            if is_known and client not in self.taken:
                self._faulty.add(client)
            self.refused[client if is_known else ascii(client)[:80]] = error.reason
            return error.reason
        if is_first():
            self.rule.add(update)
        if self.objective is not None:
            self.objective.accept(update.extras, trained)
        self.taken.append(update.client)
        self._faulty.discard(update.client)
        return None

    def _fault_of(self, update: ClientUpdate, trained: AdapterState) -> str | None:
        """What the rule or the local objective could not compute with, in an update that is valid in itself."""
        try:
            self.rule.check(update)
        except ValueError as error:
            return str(error)
        for pair in self.pairs if self.method.uses_pairs else ():
            if pair.key_A in update.delta and pair.key_B in update.delta:
                A, B = self._factors_of(pair, update.delta)
                size, limit = largest_product(pair.scaling, A, B), self._product_limits[pair.module]
                if not size <= limit:
                    return (
                        f"the product of its factors of {pair.module} may reach {size:.3g}, beyond {limit:.3g}, beside which the base "
                        "weight would not count, or which it cannot hold. Lower `learning_rate`."
                    )
        return None if self.objective is None else self.objective.fault_of(update.extras, trained)

    def _factors_of(self, pair: FactorPair, delta: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """What a client ended with."""
        delta_A, delta_B = delta[pair.key_A], delta[pair.key_B]
        rank = len(delta_A)
        A, B = self._shared[pair.key_A][:rank].float() + delta_A, self._shared[pair.key_B][:, :rank].float() + delta_B
        return pair.whole(A, B)

    def _limits_of_products(self) -> dict[str, float]:
        limits = {}
        for pair in self.pairs:
            if pair.key_A in self._shared and pair.key_B in self._shared:
                present = pair.whole(self._shared[pair.key_A], self._shared[pair.key_B])
                dtypes = self._base_dtypes.get(pair.module, ())
                limits[pair.module] = product_limit(dtypes, largest_product(pair.scaling, *present))
        return limits

    def leave_out(self, client: str, reason: str) -> None:
        """A client that was sampled sends nothing."""
        self.refused[client] = reason

    def finish(self) -> tuple[AdapterState, dict[str, LowRank]]:
        """
        The next global state, and what is to be added to the base model. Of several processes the first computes them.

        Raises:
            TooFewClientsError: If fewer updates can be used than `min_clients`, or than the rule needs.
            BrokenStateError: If the result is not finite.
        """
        self.rule.bear(len(self._faulty))
        require_clients(self.taken, self.refused, max(self.min_clients, self.rule.min_updates))
        state, left, right = from_first(self._combine)
        if self.objective is not None:
            self.objective.end_round()
        return state, {module: LowRank(left[module], right[module]) for module in left}

    def _combine(self) -> tuple[AdapterState, AdapterState, AdapterState]:
        """What the rule and the server optimiser make of the round: the state, and the factors of the base's change by module."""
        delta = self.rule.finish()
        counts = {key: value for key, value in delta.items() if key in self._buffers}
        steps = {key: value for key, value in delta.items() if key not in self._buffers}
        state = self.optimizer.step(self.state, steps, len(self.taken))
        state = PLAIN.step(state, counts)  # running statistics are averages, not parameters
        added = {
            f"the change of {module} ({side})": factor
            for module, change in self.rule.base_change.items()
            for side, factor in change._asdict().items()
        }
        broken = first_not_finite(state | added)
        if broken is not None:
            raise BrokenStateError(
                f"The step of the server has values that are not finite in {broken}, although no update had. {WAY_BACK}"
            )
        left, right = ({module: change[side] for module, change in self.rule.base_change.items()} for side in (0, 1))
        return state, left, right

    # What the next round depends on beside the global state

    def state_dict(self) -> AdapterState:
        """State of the server optimiser and of the server's part of the local objective, by flat names."""
        state = {f"optimizer.{key}": tensor for key, tensor in self.optimizer.state_dict().items()}
        if self.objective is not None:
            state |= {f"objective.{key}": tensor for key, tensor in self.objective.state_dict().items()}
        return state

    def forget(self) -> None:
        """Begin anew, because other tensors travel from now on."""
        self.load_state_dict({})

    def load_state_dict(self, state: AdapterState) -> None:
        """Take over a `state_dict`."""
        parts: dict[str, AdapterState] = {"optimizer": {}, "objective": {}}
        for entry, tensor in state.items():
            part, _, key = entry.partition(".")
            parts[part][key] = tensor
        self.optimizer.load_state_dict(parts["optimizer"])
        if self.objective is not None:
            self.objective.load_state_dict(parts["objective"])


def freeze_for_good(args: FederationArguments, model: nn.Module, live: LiveState) -> None:
    """
    Freeze what has the role "frozen" in every round, such as the `A` of FFA-LoRA, before anybody builds an optimiser.

    Raises:
        ValueError: If the patterns do not fit the tensors, or the adapter does not fit the method.
    """
    _pairs(args.aggregation, model)
    whole, travelling = live.read(include_frozen=True), live.read()
    splits = [METHODS[args.aggregation].roles(round).joined(_user_roles(args)).split(whole) for round in (1, 2)]
    frozen = splits[0].frozen.keys() & splits[1].frozen.keys() & travelling.keys()
    counted = sorted(frozen & live.buffers)
    if counted:
        raise ValueError(
            f"{counted[0]} is to be frozen, but it is a running statistic, which every forward pass in training changes. Let it be "
            "local or shared."
        )
    live.freeze(frozen)


PLAIN = ServerOptimizer()


def _user_roles(args: FederationArguments) -> TensorRoles:
    fields = given(args, "tensor_roles")
    names = set(inspect.signature(TensorRoles).parameters)
    if not set(fields) <= names:
        raise ValueError(f"`tensor_roles` has {sorted(set(fields) - names)}, but takes {sorted(names)}.")
    patterns: dict[str, Any] = {
        name: (value,) if name != "default" and isinstance(value, str) else value for name, value in fields.items()
    }
    return TensorRoles(**patterns)


def _pairs(aggregation: str, model: nn.Module) -> list[FactorPair]:
    if isinstance(model, PeftModel):
        return check_adapter(aggregation, model)
    if METHODS[aggregation].uses_pairs or aggregation in ("ffa_lora", "fedsa_lora", "rolora", "slora"):
        raise ValueError(
            f"`aggregation={aggregation!r}` is about the two factors of adapters, but a {type(model).__name__} without an adapter was "
            "given. Give a `peft_config` of a LoRA or an SCL adapter, or use 'fedavg'."
        )
    return []


def _momentum(args: FederationArguments) -> dict[str, Any]:
    """The momentum of the local SGD, which the normalisation of FedNova follows."""
    pairs = (entry.split("=") for entry in (args.optim_args or "").replace(" ", "").split(",") if entry)
    used = float(dict(pairs).get("momentum", 0)) if args.optim == OptimizerNames.SGD else 0.0
    told = given(args, "aggregation_kwargs").get("momentum", used)
    if told != used:
        raise ValueError(
            f"`aggregation_kwargs` gives 'fednova' the momentum {told}, but that of the local optimiser is {used} (`optim={args.optim!s}`, "
            f"`optim_args={args.optim_args!r}`). Leave it out: it is read from there."
        )
    return {"momentum": used}


def _most_steps(args: FederationArguments, settings: Mapping[str, ClientSettings]) -> int:
    """Local steps that no client of the run exceeds."""
    if args.max_steps <= 0:
        return MOST_STEPS
    return max([args.max_steps, *(client.max_steps for client in settings.values() if client.max_steps is not None)])


def _base_dtypes(model: nn.Module, pairs: Sequence[FactorPair]) -> dict[str, tuple[torch.dtype, ...]]:
    """
    By module the dtype of its base weight, if it is one of floating-point numbers; a quantised weight takes no
    addition.
    """
    if not isinstance(model, PeftModel):
        return {}
    base: Any = model.get_base_model()
    dtypes = {pair.module: base.get_submodule(pair.module).get_base_layer().weight.dtype for pair in pairs}
    return {module: (dtype,) for module, dtype in dtypes.items() if dtype.is_floating_point}


def _check_largest_rank(settings: Mapping[str, ClientSettings], num_clients: int, largest: int) -> None:
    ranks = [client.r or largest for client in settings.values()]
    if len(ranks) == num_clients and max(ranks) < largest:
        raise ValueError(
            f"The PEFT config has the rank {largest}, but the largest of `client_settings` is {max(ranks)}: in 'hetlora' the directions "
            f"that no client has become zero for good. Set `r={max(ranks)}` in the PEFT config."
        )


def _objective(args: FederationArguments, pairs: Sequence[FactorPair], num_clients: int) -> LocalObjective | None:
    if args.local_objective is None:
        if args.local_objective_kwargs:
            raise ValueError(
                f"`local_objective_kwargs` is {args.local_objective_kwargs}, but there is no `local_objective` for them. Name one of "
                f"{sorted(LOCAL_OBJECTIVES)}."
            )
        return None
    kind = LOCAL_OBJECTIVES[args.local_objective]
    options = _options("local_objective_kwargs", args.local_objective, kind, args)
    if _takes(kind, "num_clients"):
        options["num_clients"] = num_clients
    if _takes(kind, "pairs"):
        if not METHODS[args.aggregation].takes_ranks:
            names = [name for name, method in METHODS.items() if method.takes_ranks]
            raise ValueError(
                f"`local_objective={args.local_objective!r}` gives every client a rank of its own, but `aggregation` is "
                f"{args.aggregation!r}. Use one of {names}."
            )
        options["pairs"] = pairs
    objective = _built("local_objective_kwargs", lambda: kind(**options))
    objective.check(args)
    weights = given(args, "aggregation_kwargs").get("weights", "uniform")
    if objective.uniform and weights != "uniform":
        raise ValueError(
            f"`local_objective={args.local_objective!r}` is defined for the plain mean over clients, all weighted alike, but "
            f"`aggregation_kwargs` has `weights={weights!r}`. Leave it out."
        )
    if objective.uniform and METHODS[args.aggregation].rule is not FedAvg:
        names = [name for name, method in METHODS.items() if method.rule is FedAvg]
        raise ValueError(
            f"`local_objective={args.local_objective!r}` is defined for the plain mean over clients, all weighted alike, but "
            f"`aggregation` is {args.aggregation!r}. Use one of {names}."
        )
    return objective


def _server_optimizer(
    args: FederationArguments, objective: LocalObjective | None, num_clients: int
) -> ServerOptimizer:
    is_plain = args.server_optimizer == "sgd" and args.server_lr in (None, 1) and not args.server_optimizer_kwargs
    if not METHODS[args.aggregation].takes_server_optimizer and not is_plain:
        raise ValueError(
            f"`server_optimizer={args.server_optimizer!r}` with `server_lr={args.server_lr}` cannot follow {args.aggregation!r}: it sets "
            "the factors to new values, which are no direction to step along. Leave the server optimiser out, or use 'fedavg'."
        )
    if isinstance(objective, FedDynRegularizer):
        if not is_plain:
            raise ValueError(
                f"`local_objective='feddyn'` has a server step of its own, but `server_optimizer={args.server_optimizer!r}` with "
                f"`server_lr={args.server_lr}` was given. Leave both out."
            )
        return FedDyn(objective.alpha, num_clients)
    kind = SERVER_OPTIMIZERS[args.server_optimizer]
    options = _options("server_optimizer_kwargs", args.server_optimizer, kind, args)
    if args.server_lr is not None:
        options["lr"] = args.server_lr
    return _built("server_optimizer_kwargs", lambda: kind(**options))


def _options(field: str, name: str, kind: Callable[..., Any], args: FederationArguments) -> dict[str, Any]:
    """The user's options of a part, after refusing those it does not have."""
    names = sorted(set(inspect.signature(kind).parameters) - NOT_OPTIONS)
    options = given(args, field)
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"`{field}` has {unknown}, which {name!r} does not take. It takes {names or 'no options'}.")
    return dict(options)


def _built(field: str, build: Callable[[], Part]) -> Part:
    try:
        return build()
    except TypeError as error:  # an option without a default
        raise ValueError(f"`{field}` does not suffice: {error}.") from error


def _takes(kind: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(kind).parameters
