# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Local objectives through the trainer's own local rounds, against the algorithms written down in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.pairs import factor_pairs
from fed_trainer.methods.objectives import FedDynRegularizer, FedProx, LocalObjective, RankPruning, Scaffold
from fed_trainer.methods.server_optimizers import FedDyn
from fed_trainer.state.adapter_state import AdapterState, subtract
from fed_trainer.state.factors import truncate_ranks
from helpers.local_rounds import local_round


LR = 0.5
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# 20 rows in batches of 4 are 5 micro-batches: optimiser steps of 2, 2 and 1 of them, and one of the second epoch
ROWS, STEPS = 20, [2, 2, 1, 2]
SAMPLED = [(0, 1), (1, 2), (0, 2), (0, 1)]  # of three clients, per round
REFUSED = {(1, 2), (2, 0)}  # (round, client)

Extra = Callable[[AdapterState], AdapterState]  # what is added to the gradient at some adapter


class Federation:
    """A trainer whose local rounds are called one by one, and the same local rounds in float64."""

    def __init__(self, clients: list[Dataset], model_dir: Any, output_dir: Any, **settings: Any) -> None:
        config = {
            "max_steps": len(STEPS),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": LR,
            "optim": "sgd",
            "max_grad_norm": 0,
            "max_length": 32,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        self.trainer = FederatedTrainer(
            model=str(model_dir),
            args=FederatedConfig(output_dir=str(output_dir), num_rounds=1, **config | settings),
            train_dataset={f"client_{index}": rows for index, rows in enumerate(clients)},
            peft_config=LORA,
        )
        self.start = random_adapter(self.trainer.federation.state)
        compute_loss = self.trainer.compute_loss
        self.batches: list[dict[str, torch.Tensor]] = []
        self.trainer.compute_loss = lambda model, inputs, **kwargs: (
            self.batches.append(dict(inputs)) or compute_loss(model, inputs, **kwargs)
        )
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LORA).double()
        self.live = LiveAdapter(self.model)

    def local(
        self,
        state: AdapterState,
        client: int,
        objective: LocalObjective | None = None,
        trained: set[str] | None = None,
    ) -> AdapterState:
        self.batches.clear()
        dataset = self.trainer.client.data.prepared(f"client_{client}")
        local, metrics = local_round(self.trainer, state, dataset, client, None, 1.0, trained, objective=objective)
        assert metrics["num_steps"] == len(STEPS) and len(self.batches) == sum(STEPS)
        return local

    def local_in_float64(
        self, state: AdapterState, extra: Extra, lrs: list[float]
    ) -> tuple[AdapterState, list[AdapterState]]:
        """Plain SGD on the batches of the last `local`; also the gradients it took, without `extra`."""
        value, batches = doubled(state), list(self.batches)
        gradients = []
        for lr, count in zip(lrs, STEPS, strict=True):
            gradients.append(self.gradient(value, [batches.pop(0) for _ in range(count)]))
            term = extra(value)
            value = {key: tensor - lr * (gradients[-1][key] + term[key]) for key, tensor in value.items()}
        return value, gradients

    def gradient(self, value: AdapterState, batches: list[dict[str, torch.Tensor]]) -> AdapterState:
        """Of the mean loss per token of all the micro-batches."""
        self.live.write(value)
        self.model.zero_grad()
        losses, tokens = [], 0
        for batch in batches:
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum"))
            tokens += int((labels != -100).sum())
        (sum(losses) / tokens).backward()
        return {key: parameter.grad.clone() for key, parameter in self.live.parameters().items()}


@pytest.fixture
def make_federation(make_clients, tiny_model_dir, tmp_path):
    clients = list(make_clients(num_clients=3, rows=ROWS).values())
    return lambda **settings: Federation(clients, tiny_model_dir, tmp_path / "out", **settings)


def random_adapter(like: AdapterState, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in like.items()}


def doubled(state: AdapterState) -> AdapterState:
    return {key: tensor.double() for key, tensor in state.items()}


def zeros(like: AdapterState) -> AdapterState:
    return {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in like.items()}


def norm(state: AdapterState) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in state.values()]).norm())


def assert_close(ours: AdapterState, expected: AdapterState, scale: float) -> None:
    """To one in 10,000 of `scale`."""
    assert ours.keys() == expected.keys()
    assert norm(subtract(doubled(ours), expected)) < 1e-4 * scale


@pytest.mark.parametrize("is_personal", [False, True], ids=["fedprox", "ditto"])
def test_proximal_steps_equal_sgd_in_float64(make_federation, is_personal: bool) -> None:
    """For Ditto the reference is not where the client begins."""
    federation, mu = make_federation(), 0.4
    start = federation.start
    reference = random_adapter(start, seed=1) if is_personal else start
    objective = FedProx(mu)
    objective.begin(reference, None)
    ours = federation.local(start, 0, objective)
    w = doubled(reference)
    expected, _ = federation.local_in_float64(start, lambda v: {k: mu * (v[k] - w[k]) for k in v}, [LR] * 4)
    moved = norm(subtract(expected, start))
    assert_close(ours, expected, moved)

    plain = federation.local(start, 0)  # the objective was that of one local round only
    assert_close(plain, federation.local_in_float64(start, zeros, [LR] * 4)[0], moved)
    assert norm(subtract(ours, plain)) > 1e-2 * moved


def test_added_gradients_are_clipped_along(make_federation) -> None:
    federation = make_federation(max_grad_norm=0.01)
    objective = FedProx(100.0)
    objective.begin(random_adapter(federation.start, seed=1), None)
    ours = federation.local(federation.start, 0, objective)
    assert norm(subtract(ours, federation.start)) <= 1.001 * len(STEPS) * LR * 0.01


def test_parameters_that_are_frozen_in_a_round_stay(make_federation) -> None:
    """As in the rounds of RoLoRA: the optimiser holds both factors, and would step along any gradient."""
    federation, objective = make_federation(), FedProx(0.4)
    federation.local(federation.start, 0)  # builds the optimiser
    objective.begin(random_adapter(federation.start, seed=1), None)
    ours = federation.local(federation.start, 0, objective, {key for key in federation.start if "lora_B" in key})
    for key, tensor in ours.items():
        assert torch.equal(tensor, federation.start[key]) == ("lora_A" in key)


def test_scaffold_equals_option_two_in_float64_over_rounds(make_federation) -> None:
    """
    With a schedule, client sampling and refused clients. The reference takes the mean of the gradients themselves as
    the client's control, weighted by learning rate, and the mean over all clients as the server's.
    """
    federation = make_federation(lr_scheduler_type="linear")
    lrs = [LR, 0.75 * LR, 0.5 * LR, 0.25 * LR]
    scaffold, stored = Scaffold(num_clients=3), {}
    server = scaffold.server_half()
    scaffold.check(federation.trainer.args)
    state = federation.start
    x, controls = doubled(state), [zeros(state) for _ in range(3)]
    for round, sampled in enumerate(SAMPLED):
        deltas, expected_deltas, new_controls = [], [], list(controls)
        c = {key: sum(control[key] for control in controls) / 3 for key in x}
        for client in sampled:
            previous = stored.get(client)
            scaffold.begin(state, previous, server.to_client(str(client)))
            delta = subtract(federation.local(state, client, scaffold), state)
            new = scaffold.finish(delta)
            own = controls[client]
            y, gradients = federation.local_in_float64(x, lambda v, own=own, c=c: {k: c[k] - own[k] for k in v}, lrs)
            if (round, client) in REFUSED:
                continue
            server.accept(str(client), scaffold.to_server(), delta)
            stored[client] = new
            deltas.append(delta)
            expected_deltas.append(subtract(y, x))
            new_controls[client] = {
                key: sum(lr * gradient[key] for lr, gradient in zip(lrs, gradients, strict=True)) / sum(lrs)
                for key in x
            }
        server.end_round()
        controls = new_controls
        state = {k: tensor + sum(delta[k] for delta in deltas) / len(deltas) for k, tensor in state.items()}
        x = {k: tensor + sum(delta[k] for delta in expected_deltas) / len(deltas) for k, tensor in x.items()}
        assert_close(state, x, norm(subtract(x, federation.start)))
        for client, control in stored.items():
            assert_close(control, controls[client], norm(controls[client]))
    c = {f"control.{key}": sum(control[key] for control in controls) / 3 for key in x}
    assert_close(server.state_dict(), c, norm(c))


def test_feddyn_equals_the_paper_in_float64_over_rounds(make_federation) -> None:
    federation, alpha = make_federation(), 0.3
    objective, server, stored = FedDynRegularizer(alpha), FedDyn(alpha, num_clients=3), {}
    state = federation.start
    w, h, own = doubled(state), zeros(state), [zeros(state) for _ in range(3)]
    for round, sampled in enumerate(SAMPLED):
        deltas, expected_deltas = [], []
        for client in sampled:
            previous = stored.get(client)
            objective.begin(state, previous)
            delta = subtract(federation.local(state, client, objective), state)
            new = objective.finish(delta)
            v, _ = federation.local_in_float64(
                w, lambda v, o=own[client], w=w: {k: alpha * (v[k] - w[k]) - o[k] for k in v}, [LR] * 4
            )
            if (round, client) in REFUSED:
                continue
            stored[client] = new
            deltas.append(delta)
            expected_deltas.append(subtract(v, w))
            own[client] = {k: own[client][k] - alpha * expected_deltas[-1][k] for k in w}
        mean = {k: sum(delta[k] for delta in deltas) / len(deltas) for k in state}
        state = server.step(state, mean, num_sampled=len(deltas))
        total = {k: sum(delta[k] for delta in expected_deltas) for k in w}
        h = {k: h[k] - alpha / 3 * total[k] for k in w}
        w = {k: w[k] + total[k] / len(deltas) - h[k] / alpha for k in w}
        assert_close(state, w, norm(subtract(w, federation.start)))
        for client, correction in stored.items():
            assert_close(correction, own[client], norm(own[client]))


def test_rank_pruning_equals_sgd_on_the_penalty_in_float64(make_federation) -> None:
    federation, weight = make_federation(), 0.2
    pairs = factor_pairs(federation.trainer.model)
    start = truncate_ranks(federation.start, pairs, rank=3, pad=True)
    objective = RankPruning(pairs, decay=0.7, penalty_weight=weight)  # floor(0.7 * 3) = 2 stay
    objective.begin(start, {"rank": torch.tensor(3)})
    ours = federation.local(start, 0, objective)

    def extra(value: AdapterState) -> AdapterState:
        gradient = zeros(value)
        for pair in pairs:
            a, b = value[pair.key_A][2], value[pair.key_B][:, 2]
            gradient[pair.key_A][2] = weight * b.norm() * a / a.norm()
            gradient[pair.key_B][:, 2] = weight * a.norm() * b / b.norm()
        return gradient

    expected, _ = federation.local_in_float64(start, extra, [LR] * 4)
    assert_close(ours, expected, norm(subtract(expected, start)))
    for pair in pairs:
        assert not ours[pair.key_A][3:].any() and not ours[pair.key_B][:, 3:].any()
    assert objective.finish(subtract(ours, start))["rank"].item() == 2


def test_scaffold_refuses_the_optimiser_that_is_really_used(make_federation) -> None:
    federation = make_federation(optim="adamw_torch")
    scaffold = Scaffold(num_clients=3)
    scaffold.begin(federation.start, None)
    with pytest.raises(ValueError, match="only plain SGD allows: AdamW scales its steps"):
        federation.local(federation.start, 0, scaffold)
