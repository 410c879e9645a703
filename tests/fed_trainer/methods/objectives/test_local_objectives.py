# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Local objectives against their gradients, and on quadratics whose optimum is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from fed_trainer.methods.objectives import (
    LOCAL_OBJECTIVES,
    Ditto,
    FedDynRegularizer,
    FedProx,
    LocalObjective,
    RankPruning,
    Scaffold,
    check_plain_sgd,
)
from fed_trainer.methods.server_optimizers import FedDyn
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.factors import FactorPair
from helpers.states import random_state


SHAPES = {"A": (4, 3), "B": (5, 4)}
PAIRS = [FactorPair("module", "A", "B", scaling=2.0)]
# clients with different curvatures and optima: FedAvg with several local steps does not end at the common optimum
CURVATURES, OPTIMA = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0])
COMMON_OPTIMUM = float((CURVATURES * OPTIMA).sum() / CURVATURES.sum())


def parameters_of(state: AdapterState, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {key: nn.Parameter(tensor.to(dtype, copy=True)) for key, tensor in state.items()}


def loss_of(parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    return sum(parameter.sin().sum() for parameter in parameters.values())  # any smooth function


def term_of(objective: LocalObjective, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    """
    What the objective adds to the loss, for `start` 0 and the client's state 2 (of random_state), by its definition.
    """
    start, own = random_state(SHAPES, 0), random_state(SHAPES, 2)
    distance = sum((parameter - start[key]).square().sum() for key, parameter in parameters.items())
    linear = sum((own[key] * parameter).sum() for key, parameter in parameters.items())
    if isinstance(objective, FedProx):
        return 0.3 / 2 * distance
    if isinstance(objective, FedDynRegularizer):
        return 0.3 / 2 * distance - linear
    if isinstance(objective, Scaffold):  # c = 0
        return -linear
    return 0.3 * parameters["A"][1:3].norm() * parameters["B"][:, 1:3].norm()  # of rank 3, floor(0.5 * 3) = 1 stays


def begun(name: str) -> LocalObjective:
    kinds: dict[str, Callable[[], LocalObjective]] = {
        "ditto": lambda: Ditto(0.3),
        "fedprox": lambda: FedProx(0.3),
        "feddyn": lambda: FedDynRegularizer(0.3),
        "scaffold": lambda: Scaffold(num_clients=10),
        "rank_pruning": lambda: RankPruning(PAIRS, decay=0.5, penalty_weight=0.3),
    }
    assert name in kinds, f"add {name!r} to `begun`, and what it adds to the loss to `term_of`"
    objective = kinds[name]()
    assert type(objective) is LOCAL_OBJECTIVES[name]
    objective.begin(
        random_state(SHAPES, 0), {"rank": torch.tensor(3)} if name == "rank_pruning" else random_state(SHAPES, 2)
    )
    return objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOCAL_OBJECTIVES)
def test_added_gradient_is_that_of_the_term(name: str, dtype: torch.dtype) -> None:
    objective = begun(name)
    parameters = parameters_of(random_state(SHAPES, 1), dtype)
    loss_of(parameters).backward()
    exact = {key: nn.Parameter(parameter.detach().double()) for key, parameter in parameters.items()}
    term_of(objective, exact).backward()
    expected = {key: parameter.grad.double() + exact[key].grad for key, parameter in parameters.items()}
    objective.add_gradients(parameters, lr=0.1)
    for key, parameter in parameters.items():
        assert parameter.grad.dtype == dtype
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]  # one rounding of the sum
        torch.testing.assert_close(parameter.grad.double(), expected[key], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", LOCAL_OBJECTIVES)
def test_parameter_without_a_gradient_gets_one_that_is_its_own(name: str) -> None:
    objective, parameters = begun(name), parameters_of(random_state(SHAPES, 1))
    for _ in range(2):
        objective.add_gradients(parameters, lr=0.1)
        first = {key: parameter.grad.clone() for key, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad.mul_(5)  # as clipping and `zero_grad(set_to_none=False)` do
            parameter.grad = None
    term_of(objective, expected := parameters_of(random_state(SHAPES, 1))).backward()
    for key, parameter in expected.items():
        torch.testing.assert_close(first[key], parameter.grad)


@pytest.mark.parametrize("name", LOCAL_OBJECTIVES)
def test_gradients_are_added_where_the_parameters_are(name: str) -> None:
    parameters = {key: nn.Parameter(torch.empty(shape, device="meta")) for key, shape in SHAPES.items()}
    begun(name).add_gradients(parameters, lr=0.1)
    assert all(parameter.grad.device.type == "meta" for parameter in parameters.values())


@pytest.mark.parametrize("name", ["fedprox", "feddyn", "scaffold"])
def test_what_does_not_train_or_is_not_shared_takes_no_part(name: str) -> None:
    objective = begun(name)
    parameters = {"B": parameters_of(random_state(SHAPES, 1))["B"], "private": nn.Parameter(torch.ones(2))}
    objective.add_gradients(parameters, lr=0.1)
    assert parameters["private"].grad is None
    after = objective.finish({key: torch.ones(shape) for key, shape in SHAPES.items()})
    if objective.keeps_client_state:
        assert torch.equal(after["A"], random_state(SHAPES, 2)["A"])
        assert not torch.equal(after["B"], random_state(SHAPES, 2)["B"])
    else:
        assert after == {}


@pytest.mark.parametrize("name", LOCAL_OBJECTIVES)
def test_loss_scaling_is_refused(name: str, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="sgd", max_grad_norm=0)
    begun(name).check(args)
    args.mixed_precision = "fp16"  # from `fp16=True` or from `accelerate launch`
    with pytest.raises(ValueError, match=r"adds to the gradients of a client, but `fp16` trains .*Set `bf16=True`"):
        begun(name).check(args)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: FedProx(0.0), "`mu` should be positive and finite but the value passed is 0.0"),
        (lambda: FedDynRegularizer(-1.0), "`alpha` should be positive and finite but the value passed is -1.0"),
        (lambda: Scaffold(0), "`num_clients` should be at least 1 but the value passed is 0"),
        (lambda: RankPruning(PAIRS, 1.0, 0.1), "`decay` should be between 0 and 1 but the value passed is 1.0"),
        (
            lambda: RankPruning(PAIRS, 0.5, 0.0),
            "`penalty_weight` should be positive and finite but the value passed is 0.0",
        ),
        (
            lambda: RankPruning(
                [FactorPair("m", "A", "B", 1.0, start=(torch.ones(4, 3), torch.ones(5, 4)))], 0.5, 0.1
            ),
            "cannot be pruned",
        ),
        (
            lambda: RankPruning(PAIRS, 0.5, 0.1).begin(random_state(SHAPES, 0), None),
            "the client has no state and so no rank",
        ),
        (
            lambda: FedProx(1.0).server_half().load_state_dict({"control.A": torch.ones(1)}),
            "'control.A', which ServerHalf does not keep",
        ),
        (
            lambda: Scaffold(3).server_half().load_state_dict({"momentum.A": torch.ones(1)}),
            "which ScaffoldServer does not keep",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# SCAFFOLD


def test_server_control_is_the_mean_over_all_clients_also_those_not_sampled_or_refused() -> None:
    scaffold, num_clients = Scaffold(num_clients=5), 5
    server = scaffold.server_half()
    stored: dict[int, AdapterState] = {}
    for round, (sampled, refused) in enumerate([((0, 1, 2), ()), ((1, 3), (3,)), ((0, 3, 1), (1,)), ((4,), (4,))]):
        server.begin_round()
        for client in sampled:
            scaffold.begin(random_state(SHAPES, round), stored.get(client), server.to_client(str(client)))
            before = server.state_dict()
            scaffold.add_gradients(parameters_of(random_state(SHAPES, 7)), lr=0.1)
            new = scaffold.finish(random_state(SHAPES, 10 * round + client))
            if client not in refused:
                server.accept(str(client), scaffold.to_server(), random_state(SHAPES, 10 * round + client))
                stored[client] = new
            assert all(torch.equal(server.state_dict()[key], before[key]) for key in before), "c moved in a round"
        server.end_round()
        for key in SHAPES:
            mean = sum(state[key].double() for state in stored.values()) / num_clients
            torch.testing.assert_close(server.state_dict()[f"control.{key}"].double(), mean, rtol=1e-5, atol=1e-5)
    assert stored.keys() == {0, 1, 2, 3}


def test_server_control_goes_through_a_file(tmp_path: Path) -> None:
    server = Scaffold(num_clients=2).server_half()
    server.accept("a", {"sum_of_lrs": torch.tensor(0.5)}, random_state(SHAPES, 0))
    server.end_round()
    save_file(server.state_dict(), tmp_path / "control.safetensors")
    other = Scaffold(num_clients=2).server_half()
    other.accept("a", {"sum_of_lrs": torch.tensor(0.5)}, random_state(SHAPES, 1))  # of a round that died
    other.load_state_dict(load_file(tmp_path / "control.safetensors"))
    for half in (server, other):
        half.accept("b", {"sum_of_lrs": torch.tensor(0.2)}, random_state(SHAPES, 3))
        half.end_round()
    for key, tensor in server.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


@pytest.mark.parametrize("lrs", [[0.1] * 4, [0.2, 0.1, 0.05]], ids=["constant", "schedule"])
def test_next_client_control_is_the_mean_gradient_of_the_round(lrs: list[float]) -> None:
    scaffold, start = Scaffold(num_clients=1), random_state(SHAPES, 0)
    scaffold.begin(start, random_state(SHAPES, 3), received=random_state(SHAPES, 4))
    parameters = parameters_of(start)
    mean = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
    for lr in lrs:
        optimizer = torch.optim.SGD(parameters.values(), lr=lr)
        optimizer.zero_grad()
        loss_of(parameters).backward()
        for key, parameter in parameters.items():
            mean[key] += lr / sum(lrs) * parameter.grad
        scaffold.add_gradients(parameters, lr)
        optimizer.step()
    delta = {key: parameter.detach() - start[key] for key, parameter in parameters.items()}
    for key, control in scaffold.finish(delta).items():
        torch.testing.assert_close(control, mean[key], rtol=0, atol=1e-5)


def test_scaffold_needs_a_step_with_a_learning_rate() -> None:
    scaffold = begun("scaffold")
    scaffold.add_gradients(parameters_of(random_state(SHAPES, 1)), lr=0.0)
    with pytest.raises(ValueError, match=r"that is 0.0. Choose `warmup_steps` below the number of local steps"):
        scaffold.finish(random_state(SHAPES, 1))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"optim": "adamw_torch"}, "`optim` is 'adamw_torch'. Set `optim='sgd'`"),
        ({"optim_args": "momentum=0.9"}, "`optim_args` is 'momentum=0.9'. Set `optim_args=None`"),
        ({"weight_decay": 0.1}, "`weight_decay` is 0.1. Set `weight_decay=0.0`"),
        ({"max_grad_norm": 1.0}, "`max_grad_norm` is 1.0. Set `max_grad_norm=0.0`"),
    ],
)
def test_scaffold_refuses_settings_under_which_updates_are_not_gradients(
    setting: dict, message: str, tmp_path: Path
) -> None:
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "sgd", "max_grad_norm": 0}
    with pytest.raises(ValueError, match=message):
        Scaffold(num_clients=2).check(TrainingArguments(**plain | setting))


@pytest.mark.parametrize(
    "build, message",
    [
        (torch.optim.Adam, "only plain SGD allows: Adam scales its steps"),
        (torch.optim.AdamW, "only plain SGD allows: AdamW scales its steps"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "`momentum=0.9` adds to it"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), "`weight_decay=0.01` adds to it"),
        (
            lambda p: torch.optim.SGD([{"params": p}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}], lr=0.1),
            r"the optimiser has several: \[0.1, 0.2\]",
        ),
    ],
)
def test_scaffold_refuses_optimisers_whose_updates_are_not_gradients(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plain_sgd(build([nn.Parameter(torch.zeros(1))]))


def test_scaffold_takes_plain_sgd() -> None:
    check_plain_sgd(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


# Rank pruning


@pytest.mark.parametrize("zero", [("A",), ("B",), ("A", "B")])
def test_zero_factors_give_no_nan(zero: tuple[str, ...]) -> None:
    state = {key: torch.zeros_like(t) if key in zero else t for key, t in random_state(SHAPES, 1).items()}
    pruning, parameters = RankPruning(PAIRS, 0.5, 0.3), parameters_of(state)
    pruning.begin(state, {"rank": torch.tensor(4)})
    pruning.add_gradients(parameters, lr=0.1)
    for parameter in parameters.values():
        assert not parameter.grad.any()  # zero, and not NaN
    assert pruning.finish({key: torch.zeros_like(t) for key, t in state.items()})["rank"] == 4


@pytest.mark.parametrize("factor, rank", [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_rank_shrinks_for_the_next_round_if_the_penalty_did(factor: float, rank: int) -> None:
    start = random_state(SHAPES, 0)
    pruning = RankPruning(PAIRS, 0.5, 0.3)
    pruning.begin(start, {"rank": torch.tensor(4)})
    state = pruning.finish({"A": (factor - 1) * start["A"], "B": torch.zeros_like(start["B"])})
    assert state["rank"].item() == rank
    pruning.begin(start, state)  # it is what `begin` takes
    assert pruning.finish({key: -0.5 * tensor for key, tensor in start.items()})["rank"].item() == rank // 2


def test_pair_of_a_smaller_rank_is_cut_where_the_client_is() -> None:
    """A client of rank 8 goes to rank 4, at which a pair of rank 3 stays whole."""
    small = {"A": torch.ones(3, 6), "B": torch.ones(5, 3)}
    pruning = RankPruning(PAIRS, 0.5, 0.3)
    pruning.begin(small, {"rank": torch.tensor(8)})
    parameters = parameters_of(small)
    pruning.add_gradients(parameters, lr=0.1)
    assert not parameters["A"].grad.any() and not parameters["B"].grad.any()


# Where the rounds end, on two quadratics


def local_steps(
    client: int, start: float, objective: LocalObjective | None = None, lr: float = 0.1, steps: int = 10
) -> float:
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (CURVATURES[client] / 2 * (parameter - OPTIMA[client]) ** 2).sum().backward()
        if objective is not None:
            objective.add_gradients({"w": parameter}, lr)
        optimizer.step()
    return parameter.item()


def state_of(value: float) -> AdapterState:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def test_fedavg_ends_beside_the_common_optimum_and_scaffold_and_feddyn_at_it() -> None:
    fedavg = 0.0
    for _ in range(100):
        fedavg = sum(local_steps(client, fedavg) for client in (0, 1)) / 2
    assert abs(fedavg - COMMON_OPTIMUM) > 0.2

    for objective, server, steps, error in (
        (Scaffold(num_clients=2), None, 10, 1e-6),
        (FedDynRegularizer(1.0), FedDyn(1.0, num_clients=2), 50, 1e-3),
    ):
        half = objective.server_half()
        state, stored = 0.0, {}
        for _ in range(100):
            deltas = []
            for client in (0, 1):
                previous = stored.get(client)
                objective.begin(state_of(state), previous, half.to_client(str(client)))
                deltas.append(local_steps(client, state, objective, steps=steps) - state)
                stored[client] = objective.finish(state_of(deltas[-1]))
                half.accept(str(client), objective.to_server(), state_of(deltas[-1]))
            half.end_round()
            mean = sum(deltas) / 2
            state = state + mean if server is None else server.step(state_of(state), state_of(mean))["w"].item()
        assert state == pytest.approx(COMMON_OPTIMUM, abs=error)
