# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Optimisers, schedules and adapters that the user brings: they train what is federated, or are refused in a sentence.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import lr_scheduler as schedules
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import GreedyLR

from fed_trainer import FederatedMixin, FederatedTaskConfig, FederatedTaskTrainer
from fed_trainer.client.user_optimizer import UserSchedule
from fed_trainer.federation.movement import Movement, NothingTrainedError
from helpers.data import token_rows
from helpers.models import tiny_bert
from helpers.trainers import QUICK
from peft_scl import FederaConfig, SclConfig


TARGETS = ["query", "value"]
ADAPTERS: dict[str, PeftConfig] = {
    "LORA": LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS"),
    "SCL": SclConfig(r=2, task_type="SEQ_CLS"),
    "FEDERA": FederaConfig(r=2, keep_base=True, target_modules=TARGETS, task_type="SEQ_CLS"),
    "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=[], task_type="SEQ_CLS"),
    "LOHA": LoHaConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS"),
    "OFT": OFTConfig(r=2, oft_block_size=0, target_modules=TARGETS, task_type="SEQ_CLS"),
}


@pytest.fixture
def make_trainer(make_trainer):
    numbers = itertools.count()

    def make(model: nn.Module, optimizers: Any = (None, None), peft_config: Any = None, **given: Any) -> Any:
        clients = {f"client_{index}": token_rows(index, 8) for index in range(2)}
        given = {"kind": "task", "num_rounds": 1, "max_steps": 3, **given}
        return make_trainer(
            str(next(numbers)), peft_config, model=model, clients=clients, optimizers=optimizers, **given
        )

    return make


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Schedules


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


class Halving:
    """What a user may write: not a schedule of torch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, {"steps": 0}
        self.first = optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        self.count["steps"] += 1
        self.optimizer.param_groups[0]["lr"] = self.first / 2 ** self.count["steps"]


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "warm-up": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: step / 4),
    "MultiplicativeLR": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": lambda optimizer: schedules.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: schedules.MultiStepLR(optimizer, [1, 3], 0.5),
    "ConstantLR": lambda optimizer: schedules.ConstantLR(optimizer, 0.5, 2),
    "LinearLR": lambda optimizer: schedules.LinearLR(optimizer, 0.2, total_iters=3),
    "ExponentialLR": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: schedules.PolynomialLR(optimizer, 8),
    "CosineAnnealingLR": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 6, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 2),
    "CyclicLR": lambda optimizer: schedules.CyclicLR(optimizer, 1e-3, 1e-1, step_size_up=2),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(optimizer, 1e-1, total_steps=8),
    "SequentialLR": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.ConstantLR(optimizer, 0.1, 2), schedules.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "ChainedScheduler": lambda optimizer: schedules.ChainedScheduler(
        [schedules.LinearLR(optimizer, 0.5, total_iters=2), schedules.ExponentialLR(optimizer, 0.9)], optimizer
    ),
    "of the user": Halving,
}


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_starts_afresh_in_every_local_round_times_the_factor_of_the_round(name: str) -> None:
    def rates(schedule: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for _ in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected_of = sgd()
        expected = rates(SCHEDULES[name](expected_of), expected_of)
        assert len(set(expected)) > 1

        optimizer = sgd()
        schedule = UserSchedule(SCHEDULES[name](optimizer), optimizer, max_steps=5)
        initial = optimizer.state_dict()
        initial = {**initial, "param_groups": [dict(group) for group in initial["param_groups"]]}
        for factor in (1.0, 0.5, 1.0):
            optimizer.load_state_dict(initial)
            seen = rates(schedule.restart(factor), optimizer)
            if factor == 1:
                assert seen == expected  # bit for bit
            assert seen == pytest.approx([factor * rate for rate in expected], rel=1e-12)


def test_a_schedule_of_the_user_in_rounds(make_trainer, tmp_path) -> None:
    def given(callbacks: list[TrainerCallback]) -> dict[str, Any]:
        model = get_peft_model(tiny_bert(), ADAPTERS["LORA"])
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        schedule = schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"model": model, "optimizers": (optimizer, schedule), "callbacks": callbacks}

    plain, federated = Rates(), Rates()
    args = TrainingArguments(str(tmp_path / "plain"), **{**QUICK, "max_steps": 3}, save_strategy="no")
    Trainer(args=args, train_dataset=token_rows(0, 8), **given([plain])).train()
    assert plain.seen == [1e-3, 1e-3 / 2, 1e-3 / 3]
    make_trainer(**given([federated]), num_rounds=2, round_lr_scheduler_type="linear").train()
    assert federated.seen == [*plain.seen * 2, *[rate / 2 for rate in plain.seen] * 2]


class _Stateful:
    """Remembers its steps where no copy reaches."""

    steps = itertools.count(1)

    def __call__(self, step: int) -> float:
        return 1 / next(self.steps)


def _uncopied(optimizer: torch.optim.Optimizer) -> Any:
    schedule = schedules.ExponentialLR(optimizer, 0.9)
    schedule.log = (line for line in ())  # type: ignore[attr-defined]
    return schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda optimizer: schedules.ExponentialLR(sgd(), 0.9), "belongs to another optimiser"),
        (schedules.ReduceLROnPlateau, "follows the figures of evaluations"),
        (GreedyLR, "follows the figures of evaluations"),
        (lambda optimizer: schedules.LambdaLR(optimizer, _Stateful()), "gives other rates when it starts afresh"),
        (_uncopied, r"cannot be copied \(TypeError: .*generator"),
        (
            lambda optimizer: schedules.OneCycleLR(optimizer, 0.1, total_steps=2),
            r"fails in a local round of 3 steps \(ValueError",
        ),
    ],
)
def test_a_schedule_that_cannot_start_afresh(make_trainer, make, message: str) -> None:
    model = get_peft_model(tiny_bert(), ADAPTERS["LORA"])
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=rf"The schedule of `optimizers` \(\w+\) {message}"):
        make_trainer(model, (optimizer, make(optimizer)))


def test_a_schedule_without_an_optimizer(make_trainer) -> None:
    with pytest.raises(ValueError, match="belongs to no optimiser of that pair"):
        make_trainer(get_peft_model(tiny_bert(), ADAPTERS["LORA"]), (None, schedules.ExponentialLR(sgd(), 0.9)))


# Optimisers


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_optimizer_made_before_the_adapter(make_trainer, kind: str) -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(
        ValueError, match=r"lacks \d+ of the \d+ tensors that are trained .* `optimizer_cls_and_kwargs`"
    ):
        make_trainer(model, (optimizer, None), peft_config=ADAPTERS[kind])


def test_an_optimizer_that_lacks_some_or_holds_others(make_trainer) -> None:
    model = get_peft_model(tiny_bert(), ADAPTERS["LORA"])
    some = trained(model)
    with pytest.raises(ValueError, match=rf"\(AdamW\) lacks 1 of the {len(some)} tensors that are trained"):
        make_trainer(model, (torch.optim.AdamW(some[1:]), None))
    with pytest.raises(ValueError, match="holds 1 tensors that are not parameters of the model"):
        make_trainer(model, (torch.optim.AdamW([*some, nn.Parameter(torch.zeros(2))]), None))
    trainer = make_trainer(
        model, (torch.optim.AdamW(model.parameters(), lr=1e-2), None)
    )  # frozen ones get no gradient
    trainer.train()
    given = {"params": some[1:], "lr": 1e-2}
    trainer = make_trainer(model, optimizer_cls_and_kwargs=(torch.optim.SGD, given))
    with pytest.raises(ValueError, match=rf"\(\w+\) lacks 1 of the {len(some)} tensors"):
        trainer.train()
    make_trainer(model, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-2})).train()


# Adapters


def _merged(model: Any) -> None:
    model.merge_adapter()


def _one_merged(model: Any) -> None:
    next(
        module for module in model.modules() if hasattr(module, "merged_adapters") and hasattr(module, "merge")
    ).merge()


def _disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _one_disabled(model: Any) -> None:
    next(module for module in model.modules() if hasattr(module, "merged_adapters")).enable_adapters(False)


def _head_disabled(model: Any) -> None:
    model.get_base_model().classifier.enable_adapters(False)


def _two_active(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):  # PEFT has no head of two adapters
            module.set_adapter(["default", "second"])


def _another_active_somewhere(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    next(module for module in model.modules() if hasattr(module, "merged_adapters")).set_adapter("second")


def _frozen(model: Any) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_merged, "is merged into the base weights"),
        (_one_merged, "is merged into the base weights"),
        (_disabled, "is switched off"),
        (_one_disabled, "is switched off"),
        (_head_disabled, "is switched off"),
        (_two_active, r"\['default', 'second'\] are active, but 'default' is"),
        (_another_active_somewhere, r"\['second'\] are active, but 'default' is"),
        (_frozen, "Nothing is trainable"),
    ],
)
def test_an_adapter_that_training_does_not_reach(make_trainer, kind: str, spoil, message: str) -> None:
    model = get_peft_model(tiny_bert(), ADAPTERS[kind])
    spoil(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(model)


def test_an_adapter_that_is_merged_after_the_trainer_was_made(make_trainer) -> None:
    model = get_peft_model(tiny_bert(), ADAPTERS["LORA"])
    trainer = make_trainer(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base weights"):
        trainer.train()


@pytest.mark.parametrize("kind", ["LORA", "SCL", "FEDERA"])
def test_a_part_of_an_adapter_that_is_frozen_stays(make_trainer, kind: str) -> None:
    """Freezing the `A` is LoRA-FA: what does not require gradients neither trains nor travels."""
    model = get_peft_model(tiny_bert(), ADAPTERS[kind])
    frozen = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "_A" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert frozen and moved and moved == {name for name in before if model.get_parameter(name).requires_grad}


@pytest.mark.parametrize("gives_config", [True, False])
def test_an_adapter_of_transformers_own(make_trainer, gives_config: bool) -> None:
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(
        ValueError, match=r"has an adapter already \(at .*query\) without a `PeftModel`.* give a `peft_config`"
    ):
        make_trainer(model, **({"peft_config": ADAPTERS["LORA"]} if gives_config else {}))


# Runs in which nothing moves


class Detached(FederatedTaskTrainer):
    """Its loss does not depend on what is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss * 0


@pytest.mark.fast(kind=["LORA"])
@pytest.mark.parametrize("kind", ["LORA", "SCL", "FEDERA"])
@pytest.mark.parametrize(
    "aggregation", ["fedavg", "fednova", "ffa_lora", "rolora", "fedsa_lora", "flora", "fedex_lora", "median"]
)
def test_a_run_in_which_nothing_moves_ends_with_an_error(make_trainer, kind: str, aggregation: str) -> None:
    trainer = make_trainer(tiny_bert(), kind=Detached, peft_config=ADAPTERS[kind], aggregation=aggregation)
    with pytest.raises(
        NothingTrainedError, match="In round 1 no client has changed what it trains .* nothing would be learnt"
    ):
        trainer.train()


@pytest.mark.fast(aggregation=["fedavg", "rolora", "fedex_lora"])
@pytest.mark.parametrize("aggregation", ["fedavg", "ffa_lora", "rolora", "fedsa_lora", "flora", "fedex_lora"])
@pytest.mark.parametrize("settings", [{"max_steps": 1}, {"round_lr_scheduler_type": "linear"}, {"learning_rate": 0.0}])
def test_a_run_in_which_little_moves_ends_as_it_should(
    make_trainer, aggregation: str, settings: dict[str, Any]
) -> None:
    """One step moves `B` alone, and an intended rate of zero nothing."""
    trainer = make_trainer(
        tiny_bert(), peft_config=ADAPTERS["LORA"], aggregation=aggregation, num_rounds=2, **settings
    )
    assert trainer.train().global_step == 2


def test_movement_by_rounds(caplog) -> None:
    zero, some = False, True

    def end(movement: Movement, *seen: tuple[bool, bool]) -> None:
        movement.begin()
        for client, (moved, has_rate) in enumerate(seen):
            movement.saw(f"client_{client}", moved, has_rate)
        movement.end(7)

    end(Movement(), (zero, True), (some, True))  # one is enough
    end(Movement(), (zero, False), (zero, False))  # a rate of zero
    end(Movement())  # nobody: the server complains
    for seen in ([(zero, True)], [(zero, False), (zero, True)]):
        with pytest.raises(NothingTrainedError, match="In round 7"):
            end(Movement(), *seen)
    movement = Movement()
    end(movement, (some, True))
    for later in (movement, Movement(has_begun=True)):
        end(later, (zero, True))  # rounding at the end of a schedule is no reason to end a long run


# Weights


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_weights_that_were_written_after_the_trainer_was_made_are_not_overwritten_without_a_word(
    make_trainer, adapter
):
    model = tiny_bert()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trainer = make_trainer(model)
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    with pytest.raises(ValueError, match="1 trained tensors of the model were changed since the trainer was made"):
        trainer.train()
    with torch.no_grad():
        parameter.copy_(before)
    trainer.train()


class HasClient(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.client = "of a tracker"


class HasFederation(Trainer):
    def federation(self) -> int:
        return 1


@pytest.mark.parametrize("underneath, name", [(HasClient, "client"), (HasFederation, "federation")])
def test_what_a_trainer_underneath_has_of_its_own_is_not_written_over(underneath, name, tmp_path):
    kind = type("Mine", (FederatedMixin, underneath), {"_config_class": FederatedTaskConfig})
    args = FederatedTaskConfig(output_dir=str(tmp_path), num_rounds=1, **QUICK)
    with pytest.raises(TypeError, match=f"`Mine` has `{name}` of its own, where a federation keeps its parts"):
        kind(tiny_bert(), args, {"a": token_rows(0, 8)})


def test_a_trainer_underneath_that_keeps_a_record_of_its_own_is_refused(tmp_path):
    class HasRecord(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.record = {}

    kind = type("Mine", (FederatedMixin, HasRecord), {"_config_class": FederatedTaskConfig})
    with pytest.raises(TypeError, match="`Mine` sets `record`, under which a federation has its record"):
        kind(
            tiny_bert(), FederatedTaskConfig(output_dir=str(tmp_path), num_rounds=1, **QUICK), {"a": token_rows(0, 8)}
        )
