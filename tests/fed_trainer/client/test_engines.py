# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Engines are chosen by one table and asked in one place; test_distributed.py trains with the real ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file

import fed_trainer
from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.client.engines import ENGINES, Engine, engine_of
from fed_trainer.client.engines.deepspeed import DeepSpeed
from fed_trainer.client.engines.fsdp import FSDP2
from fed_trainer.client.tasks import Task
from fed_trainer.state.refusals import Refusal, refuse
from helpers.local_rounds import local_round


ROOT = Path(fed_trainer.__file__).parent
ENGINE_QUESTION = re.compile(
    r"is_(deepspeed|fsdp)_enabled|(?<!_engine)\.num_processes|DistributedType|\.distributed_type|(deepspeed|fsdp)_plugin"
)


class Counting(Engine):
    """Notes what is asked of it, and refuses a setting."""

    holds_weights = True
    refusals = (Refusal(lambda setup: setup.args.keep_optimizer_state, lambda setup: f"with {setup.plugin}"),)
    plugin = "what it counts"

    def __init__(self, state: object = None) -> None:
        super().__init__(state)
        self.events: list[str] = []

    def built(self, wrapped: torch.nn.Module, optimizer: object) -> None:
        super().built(wrapped, optimizer)
        self.events.append("built")

    def read(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        self.events.append("read")
        yield from super().read(tensors)

    def write(self, values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.events.append("write")
        super().write(values)


@pytest.fixture
def make_trainer(tiny_model_dir, make_clients, tmp_path):
    def make(folder="out", **settings):
        args = FederatedConfig(
            output_dir=str(tmp_path / folder),
            num_rounds=2,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return FederatedTrainer(str(tiny_model_dir), args, make_clients(num_clients=2), peft_config=lora)

    return make


@pytest.mark.parametrize(
    ("kind", "engine"),
    [("NO", Engine), ("MULTI_CPU", Engine), ("MULTI_GPU", Engine), ("DEEPSPEED", DeepSpeed), ("FSDP", FSDP2)],
)
def test_one_table_chooses_the_engine(kind, engine):
    chosen = engine_of(SimpleNamespace(distributed_type=DistributedType(kind), num_processes=2))
    assert type(chosen) is engine and chosen.kind == kind and chosen.has_fixed_parameters
    assert chosen.holds_weights == (engine is not Engine)


def test_engines_are_asked_about_in_their_folder_alone():
    asked = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if ENGINE_QUESTION.search(line)
    }
    assert asked and all(name.startswith("client/engines/") for name in asked), asked


def test_a_new_engine_is_a_class_and_a_line_in_the_table(make_trainer, monkeypatch, tmp_path):
    make_trainer("plain").train()
    monkeypatch.setitem(ENGINES, DistributedType.NO, Counting)
    trainer = make_trainer("new")
    trainer.train()
    engine = trainer._engine
    assert isinstance(engine, Counting) and trainer._live_adapter.engine is engine
    assert engine.events.count("built") == 1
    before = engine.events.count("write")
    local_round(trainer, trainer.federation.state, trainer.client.data.prepared("client_0"), 0)
    assert engine.events.count("write") == before + 1 and engine.events[-1] == "read"
    plain, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "new"))
    assert plain.keys() == new.keys() and all(torch.equal(plain[key], new[key]) for key in plain)
    with pytest.raises(NotImplementedError, match="with what it counts"):
        make_trainer("refused", keep_optimizer_state=True)


def test_tasks_of_a_list_are_those_of_single_calls(make_trainer):
    trainer = make_trainer()
    start, rows = trainer.federation.state, [trainer.client.data.prepared(f"client_{client}") for client in range(2)]
    tasks = [Task(start, rows[seed], seed, lr_factor=0.5 + seed, keeps_optimizer=seed == 1) for seed in range(2)]
    together = trainer.local_rounds(tasks)
    alone = [trainer.local_rounds([task])[0] for task in reversed(tasks)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(one.state[key], other.state[key]) for key in start)
        assert one.metrics["train_loss"] == other.metrics["train_loss"]
    assert together[0].optimizer_state is None
    kept, again = together[1].optimizer_state, alone[1].optimizer_state
    assert kept and kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)
    assert trainer.local_rounds([]) == []


def test_the_first_row_that_applies_is_raised():
    rows = (
        Refusal(lambda number: number > 2, lambda number: f"{number} is too large", ValueError),
        Refusal(lambda number: number > 1, "it is large"),
    )
    refuse(rows, 1)
    with pytest.raises(NotImplementedError, match="^it is large$"):
        refuse(rows, 2)
    with pytest.raises(ValueError, match="^3 is too large$"):
        refuse(rows, 3)
