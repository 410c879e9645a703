# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Wherever a local round breaks off, and whatever is switched on, the clients after it give the bits that they give
without it.

A federation runs with clients that each fail somewhere else, and a healthy one after each; then without those that
fail.
"""

from __future__ import annotations

import functools
import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from fed_trainer import FederatedConfig, FederatedDPOConfig, FederatedDPOTrainer, FederatedTrainer
from fed_trainer.client.put_back import _HOOKS, remember_hooks
from fed_trainer.client.tasks import Task, Trained
from fed_trainer.federation.packet import Packet
from fed_trainer.state.client_errors import TurnFailedError
from helpers.comparison import same
from helpers.data import preferences_of
from helpers.local_rounds import local_round
from helpers.trainers import QUICK_TEXT


class Exchanging(torch.optim.SGD):
    """
    Trains at twice the weights that are to be used, as far as it has trained them: schedule-free optimisers do the
    like.
    """

    def train(self) -> None:
        self._exchange(True, 2.0)

    def eval(self) -> None:
        self._exchange(False, 0.5)

    @torch.no_grad()
    def _exchange(self, is_training: bool, factor: float) -> None:
        group = self.param_groups[0]
        if group.setdefault("is_training", False) != is_training:
            group["is_training"] = is_training
            for parameter in self.state:
                parameter.mul_(factor)

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["is_training"]
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None and parameter not in self.state:
                self.state[parameter] = {"is_trained": torch.ones(1)}
                with torch.no_grad():
                    parameter.mul_(2.0)
        return super().step(closure)


EVENTS = {"on_substep_end": 2, "on_pre_optimizer_step": 1, "on_step_end": 1}
POINTS = {  # the call in a local round that fails
    "preparation": 1,
    "data_loader": 1,
    "collator": 4,
    "forward": 2,
    "forward_with_flags": 2,
    "backward": 2,
    **EVENTS,
    "optimizer": 2,
    "end": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neftune, checkpointing": {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True},
    "neftune, reentrant, bf16": {
        "neftune_noise_alpha": 5.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "bf16": True,
    },
    "packing, clipping, schedule, smoothing": {
        "packing": True,
        "packing_strategy": "wrapped",
        "max_grad_norm": 0.01,
        "lr_scheduler_type": "linear",
        "label_smoothing_factor": 0.1,
    },
    "debug": {"debug": "underflow_overflow", "skip_memory_metrics": False},
    "fedprox": {"local_objective": "fedprox", "local_objective_kwargs": {"mu": 1.0}},
    "scaffold": {"local_objective": "scaffold", "optim": "sgd", "max_grad_norm": 0.0, "num_rounds": 2},
    "feddyn": {"local_objective": "feddyn", "local_objective_kwargs": {"alpha": 1.0}},
    "ditto": {"local_objective": "ditto", "local_objective_kwargs": {"mu": 1.0}},
    "keep_optimizer_state": {"keep_optimizer_state": True, "num_rounds": 2},
    "slora": {
        "aggregation": "slora",
        "aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1},
        "num_rounds": 2,
    },
    "dpo, checkpointing": {"reference": "round", "gradient_checkpointing": True},
    "an optimiser that exchanges weights": {"optimizer_cls_and_kwargs": (Exchanging, {"lr": 0.1})},
}
LOCAL = {
    **QUICK_TEXT,
    "num_rounds": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


class BrokenError(RuntimeError):
    """What the clients fail with."""


class Breaker(TrainerCallback):
    """Fails where the name of the client, `"<index> <point>"`, says it; remembers what healthy clients give."""

    def __init__(self, skips: bool, which: int) -> None:
        self.skips = skips  # whether the turns that would fail are not taken at all
        self.breaks = which  # which local round of a turn breaks off
        self.point, self.client, self.calls = "", "", 0
        self.local_rounds: dict[str, list[Any]] = defaultdict(list)
        self.forwards: Counter[str] = Counter()
        self.hooks: list[int] = []  # after each turn
        self.drawn: dict[str, list[Any]] = defaultdict(list)  # random numbers, before each turn

    def reach(self, point: str, *_: Any, **__: Any) -> None:
        if point != self.point or (point != "preparation" and len(self.local_rounds[self.client]) + 1 < self.breaks):
            return
        self.calls += 1
        if self.calls < POINTS[point]:
            return
        random.random(), np.random.rand(), torch.rand(1)
        if point == "forward_with_flags":
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.set_autocast_enabled("cpu", True)
        raise BrokenError

    def attach(self, trainer: Any) -> None:
        """Have it called at each of the points."""
        turn, local_rounds, build_engine = trainer.client.turn, trainer.local_rounds, trainer._build_engine

        def taken(packet: Packet) -> Packet:
            client = packet.meta["client"]
            self.client, self.calls = client, 0
            self.point = client.split()[1] if " " in client else ""
            if self.point and self.skips:
                raise TurnFailedError("it is not asked", {})
            if not self.point:  # as a preparation may do
                self.drawn[client].append((random.random(), np.random.rand(), torch.rand(1).item()))
            try:
                return turn(packet)
            finally:
                self.hooks.append(hooks_of(trainer))
                self.client = self.point = ""

        def remembered(tasks: list[Task]) -> list[Trained]:
            results = local_rounds(tasks)
            for trained in results:
                figures = {key: value for key, value in trained.metrics.items() if key != "seconds"}
                self.local_rounds[self.client].append((trained.state, figures))
            return results

        def built() -> None:
            build_engine()
            trainer.optimizer.optimizer.register_step_post_hook(lambda *args: self.reach("optimizer"))

        trainer.client.turn, trainer.local_rounds, trainer._build_engine = taken, remembered, built
        once = functools.cache(functools.partial(trainer._prepare_client_dataset, client="all"))  # of the same rows
        prepare = self.reaching(once, "preparation")
        trainer._prepare_client_dataset = lambda dataset, client: prepare(dataset)
        for name, point in {
            "get_train_dataloader": "data_loader",
            "data_collator": "collator",
            "log": "end",
        }.items():
            setattr(trainer, name, self.reaching(getattr(trainer, name), point))
        trainer.add_callback(self)
        first, last = (layer.mlp for layer in trainer.model.get_base_model().model.layers)
        last.register_forward_pre_hook(self.passed)
        first.register_forward_hook(
            lambda module, inputs, output: (
                output.register_hook(lambda _: self.reach("backward")) and None if output.requires_grad else None
            )
        )

    def reaching(self, function: Any, point: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.reach(point)
            return function(*args, **kwargs)

        return called

    def passed(self, *_: Any) -> None:
        self.forwards[self.client] += 1
        self.reach("forward")
        self.reach("forward_with_flags")


for _event in EVENTS:
    setattr(Breaker, _event, lambda self, *_, event=_event, **__: self.reach(event))


def hooks_of(trainer):
    return sum(len(getattr(module, hooks)) for module in trainer.model.modules() for hooks in _HOOKS)


@pytest.fixture(scope="module")
def run(little_garbage, make_clients, tiny_model_dir, tmp_path_factory):
    """`run(option, with_failures)` gives the trainer and the breaker of a whole run, which is made once."""
    rows = make_clients(num_clients=1, rows=16)["client_0"].remove_columns("topic")
    runs: dict[tuple[str, bool], tuple[Any, Breaker]] = {}

    def make(option: str, with_failures: bool) -> tuple[Any, Breaker]:
        if (option, with_failures) in runs:
            return runs[option, with_failures]
        is_dpo = option.startswith("dpo")
        data = rows
        if is_dpo:
            data = preferences_of({"": rows}, 10)[""].select([0, 2, 4, 6, 8])
        clients = {"00": data}
        for index, point in enumerate(POINTS, 1):
            clients[f"{index:02d} {point}"] = clients[f"{index:02d}-{point}"] = data
        kind, config = (FederatedDPOTrainer, FederatedDPOConfig) if is_dpo else (FederatedTrainer, FederatedConfig)
        output, settings = tmp_path_factory.mktemp("run"), LOCAL | OPTIONS[option]
        optimizer = {name: settings.pop(name) for name in ["optimizer_cls_and_kwargs"] if name in settings}
        trainer = kind(
            model=str(tiny_model_dir),
            args=config(output_dir=str(output), **settings),
            train_dataset=clients,
            eval_dataset={"00": data} if option == "ditto" else data,
            peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["v_proj"], task_type="CAUSAL_LM"),
            **optimizer,
        )
        breaker = Breaker(not with_failures, 1 + (option == "ditto"))
        breaker.attach(trainer)
        trainer.train()
        return runs.setdefault((option, with_failures), (trainer, breaker))

    return make


@pytest.mark.fast(option=["packing, clipping, schedule, smoothing", "ditto", "slora", "dpo, checkpointing"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_next_client_gives_the_bits_that_it_gives_without_the_failure(run, option, point):
    client = f"{list(POINTS).index(point) + 1:02d}-{point}"
    trainer, breaker = run(option, True)
    failed = client.replace("-", " ")
    for entry in trainer.record["rounds"]:
        assert entry["refused"][failed].endswith("BrokenError")
    assert len(breaker.local_rounds[failed]) == (option == "ditto" and point != "preparation")
    _, without = run(option, False)
    assert len(breaker.local_rounds[client]) == trainer.args.num_rounds * (1 + (option == "ditto"))
    for (state, figures), (expected, expected_figures) in zip(
        breaker.local_rounds[client], without.local_rounds[client], strict=True
    ):
        assert same(state, expected)
        assert figures == expected_figures
    assert breaker.drawn[client] == without.drawn[client]
    assert breaker.forwards[client] == without.forwards[client]  # with checkpointing the backward pass makes some more


@pytest.mark.fast("packing, clipping, schedule, smoothing", "ditto", "slora", "dpo, checkpointing")
@pytest.mark.parametrize("option", OPTIONS)
def test_the_run_is_that_without_the_clients_that_fail(run, option):
    (trainer, breaker), (without, _) = run(option, True), run(option, False)
    assert same(trainer.federation.state, without.federation.state)
    for entry, expected in zip(trainer.record["rounds"], without.record["rounds"], strict=True):
        assert entry["train_loss"] == expected["train_loss"]
        assert entry["eval"]["eval_loss"] == expected["eval"]["eval_loss"]
    assert trainer._total_train_tokens == without._total_train_tokens
    assert len(set(breaker.hooks)) == 1 and hooks_of(trainer) == hooks_of(without)
    assert trainer.is_in_train is False and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.fast("neftune, reentrant, bf16")
@pytest.mark.parametrize("option", ["neftune, checkpointing", "neftune, reentrant, bf16"])
def test_what_is_switched_on_is_on_at_all_clients(run, option):
    plain, breaker = run("plain", False)[1], run(option, True)[1]
    for client in plain.local_rounds:
        assert not same(plain.local_rounds[client][0][0], breaker.local_rounds[client][0][0])
        assert breaker.forwards[client] == 2 * plain.forwards[client]


def test_an_interrupt_leaves_nothing_behind(run, make_clients, tiny_model_dir, tmp_path):
    """The run is over, but its trainer is not."""
    trainer = FederatedTrainer(
        model=str(tiny_model_dir),
        args=FederatedConfig(
            output_dir=str(tmp_path), **LOCAL | {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}
        ),
        train_dataset={"00": make_clients(num_clients=1)["client_0"]},
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    )
    local = trainer.federation.state, trainer.client.data.prepared("00"), 0
    expected, _ = local_round(trainer, *local)
    hooks, training_step = hooks_of(trainer), trainer.training_step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        training_step(*args, **kwargs)
        raise KeyboardInterrupt

    trainer.training_step = interrupted
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            local_round(trainer, *local)
    trainer.training_step = training_step
    assert hooks_of(trainer) == hooks and not trainer.is_in_train and trainer.accelerator.sync_gradients
    assert same(local_round(trainer, *local)[0], expected)


def test_gradients_of_a_step_that_broke_off_count_as_scaled(run):
    """fp16: a scaler that has unscaled them refuses to do it again before it has made a step."""
    trainer, _ = run("plain", False)
    scaler, parameter = torch.amp.GradScaler("cpu"), next(iter(trainer._live_adapter.parameters().values()))
    trainer.accelerator.scaler, trainer._initial_scaler_state = scaler, scaler.state_dict()
    try:
        for _ in range(2):
            parameter.grad = torch.ones_like(parameter)
            scaler.scale(torch.ones(1))
            scaler.unscale_(trainer.optimizer.optimizer)
            with pytest.raises(BrokenError), trainer._breaking_off():
                raise BrokenError
        assert parameter.grad is None
    finally:
        trainer.accelerator.scaler = trainer._initial_scaler_state = None


def test_hooks_that_transformers_installs_once_stay(tiny_model_dir):
    """They come with the first forward pass that needs them; without them a model gives no hidden states any more."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokens = torch.arange(8)[None]
    put_back = remember_hooks(model)
    expected = model(tokens, output_hidden_states=True).hidden_states
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    put_back()
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected) == 3 and all(map(torch.equal, hidden, expected))
    assert not seen
