# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples of CONTRIBUTING.md, taken from its text: each is registered as it says there, and works."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fed_trainer import ClientUpdate, FederatedConfig, FederatedTaskConfig, FederatedTrainer, read_record
from fed_trainer.client.engines import ENGINES, engine_of
from fed_trainer.federation.packet import Packet
from fed_trainer.methods.aggregation import METHODS, Aggregator, FedAvg, Method, NormBounding
from fed_trainer.methods.codecs import CODECS, Step
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.client_errors import TurnFailedError


ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# by the path in the first line, up to a colon, the rest of the block
BLOCKS: dict[str, str] = dict(re.findall(r"^```python\n# ([\w/.]+)[^\n]*\n(.*?)^```", TEXT, flags=re.M | re.S))
TABLES = {
    "METHODS": ("fed_trainer/methods/aggregation/methods.py", "fed_trainer/methods/aggregation/sign_election.py"),
    "CODECS": ("fed_trainer/methods/codecs/__init__.py", "fed_trainer/methods/codecs/int8.py"),
    "LOCAL_OBJECTIVES": ("fed_trainer/methods/objectives/__init__.py", "fed_trainer/methods/objectives/momentum.py"),
    "ENGINES": ("fed_trainer/client/engines/__init__.py", "fed_trainer/client/engines/xla.py"),
}
TRAINER = ("fed_trainer/config.py", "fed_trainer/trainers/seq2seq.py")
TRANSPORT = "fed_trainer/federation/transport/folder.py"
CONFIG = {
    "num_rounds": 2,
    "max_steps": 1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "learning_rate": 0.5,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_rounds": 100,
}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def load(path: str) -> ModuleType:
    """The module of an example, as if the block were its file."""
    module = ModuleType(module_name(path))
    module.__package__ = module.__name__.rpartition(".")[0]
    exec(compile(BLOCKS[path], path, "exec"), module.__dict__)
    return module


def entry_of(table: str) -> tuple[dict[Any, Any], Any, Any]:
    """A table, and the key and value of the line that the text says to add."""
    path, example = TABLES[table]
    owner = importlib.import_module(module_name(path))
    ((key, value),) = eval(f"{{{BLOCKS[path]}}}", {**vars(owner), **vars(load(example))}).items()
    return getattr(owner, table), key, value


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    def enter_into(table: str) -> Any:
        entries, key, value = entry_of(table)
        assert key not in entries, f"{key} is in {table} already: take an example that is new"
        monkeypatch.setitem(entries, key, value)
        return value

    return enter_into


@pytest.fixture(scope="module")
def make_trainer(tiny_model_dir, make_clients, tmp_path_factory):
    def make(**settings: Any) -> FederatedTrainer:
        args = FederatedConfig(
            max_length=16, **{"output_dir": str(tmp_path_factory.mktemp("out")), **CONFIG, **settings}
        )
        lora = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
        return FederatedTrainer(str(tiny_model_dir), args, make_clients(num_clients=2, rows=4), peft_config=lora)

    return make


@pytest.fixture(scope="module")
def plain(make_trainer) -> FederatedTrainer:
    trainer = make_trainer()
    trainer.train()
    return trainer


def differences(trainer: FederatedTrainer, other: FederatedTrainer) -> set[str]:
    ours, theirs = trainer.federation.state, other.federation.state
    assert ours.keys() == theirs.keys()
    return {key for key in ours if not torch.equal(ours[key], theirs[key])}


def rounds_of(trainer: Any) -> list[dict[str, Any]]:
    return read_record(trainer.args.output_dir)["rounds"]


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The text


def test_every_example_is_tested_and_short() -> None:
    tested = {*TRAINER, TRANSPORT, *(path for paths in TABLES.values() for path in paths)}
    assert BLOCKS.keys() == tested, "add a test of the example here"
    assert TEXT.count("```python") == len(BLOCKS), "a block of Python begins with the path of its file"
    for path, block in BLOCKS.items():
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) < 40, f"{path}: {len(lines)} lines"
        assert (ROOT / path).exists() == (len(lines) == 1 or path == TRAINER[0]), path


def test_what_the_tables_name_is_there() -> None:
    of_rules, of_trainers = (re.findall(heading + r"\n\|---\|---\|\n((?:\|.*\n)+)", TEXT)[0] for heading in HOOKS)
    hooks = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in of_rules.splitlines()))
    assert len(hooks) > 8 and all(hasattr(Aggregator, name) for name in hooks), hooks
    names = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in of_trainers.splitlines()))
    assert len(names) == 4 and all(hasattr(FederatedTrainer, name) for name in names), names
    for file, names in OWNERS.items():
        module = importlib.import_module(module_name(f"fed_trainer/{file}"))
        assert f"`{file}`" in TEXT and all(f"`{name}`" in TEXT and hasattr(module, name) for name in names)


HOOKS = (r"\| hook of a rule \| what it says \|", r"\| override \| to \|")
OWNERS = {"output/report.py": ["round_table"], "output/card.py": ["_facts"]}


# An aggregation rule


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_rule_is_its_formula(sizes: list[int], seed: int) -> None:
    _, _, method = entry_of("METHODS")
    rule, state = method.build(), {"a": draws(seed, 2, 3), "b": draws(seed + 1, 4)}
    rule.begin(state)
    deltas = [{key: draws(seed + 7 * k + len(key), *t.shape) for key, t in state.items()} for k in range(len(sizes))]
    for size, delta in zip(sizes, deltas, strict=True):
        rule.add(ClientUpdate(f"client {size}", size, delta))
    result = rule.finish()
    for key, tensor in result.items():
        for index, value in enumerate(tensor.flatten().tolist()):
            values = [delta[key].flatten()[index].double().item() for delta in deltas]
            total = sum(size * value for size, value in zip(sizes, values, strict=True))
            agree = [(size, value) for size, value in zip(sizes, values, strict=True) if value * total > 0]
            expected = sum(size * value for size, value in agree) / sum(size for size, _ in agree)
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_rule_runs_a_federation(enter, make_trainer, plain) -> None:
    enter("METHODS")
    trainer = make_trainer(aggregation="sign_election")
    trainer.train()
    assert differences(trainer, plain)


class HalfOfLast(FedAvg):
    """Hooks: it remembers its last delta and goes half a step further along; the local budget is an option."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget, self.last = budget, {}

    @classmethod
    def options_from(cls, args: Any) -> dict[str, Any]:
        return {"budget": args.max_steps}

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("num_examples", "num_steps")

    def check(self, update: ClientUpdate) -> None:
        super().check(update)
        if update.num_steps != self.budget:
            raise ValueError(f"it has taken {update.num_steps} of {self.budget} steps")

    def finish(self) -> dict[str, torch.Tensor]:
        before, mean = self.last, super().finish()
        self.last = {key: tensor + before.get(key, 0) / 2 for key, tensor in mean.items()}
        return dict(self.last)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"last.{key}": tensor.clone() for key, tensor in self.last.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.last = {key.removeprefix("last."): tensor for key, tensor in state.items()}


def test_a_rule_with_hooks_is_its_file_and_a_line(make_trainer, plain, tmp_path, monkeypatch) -> None:
    """What it remembers is in the checkpoint, what it reads is counted, and a run starts without a memory."""
    monkeypatch.setitem(METHODS, "half_of_last", Method(HalfOfLast, linear=True))
    settings = {"aggregation": "half_of_last", "num_rounds": 3}
    whole = make_trainer(**settings)
    assert whole.federation.server.rule.budget == 1
    whole.train()
    assert rounds_of(whole)[0]["bytes_up"] == rounds_of(plain)[0]["bytes_up"] + 2 * 8
    make_trainer(**(settings | {"num_rounds": 2, "output_dir": str(tmp_path)})).train()
    resumed = make_trainer(**settings, output_dir=str(tmp_path))
    resumed.federation.server.rule.last = {"left": torch.ones(1)}
    resumed.train(resume_from_checkpoint=True)
    assert not differences(whole, resumed) and "left" not in resumed.federation.server.rule.last
    again = NormBounding(1e9, HalfOfLast(1))
    again.load_state_dict(whole.federation.server.rule.state_dict())
    assert again.state_dict().keys() == {f"last.{key}" for key in whole.federation.state}
    with pytest.raises(ValueError, match=r"The state has 'last\..*', which FedAvg does not keep. Resume with"):
        FedAvg().load_state_dict(again.state_dict())


# A codec


@given(seed=st.integers(0, 99), size=st.sampled_from([1e-8, 1.0, 1e4]), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_the_codec_is_a_quarter_of_the_bytes_and_near(seed: int, size: float, dtype: str) -> None:
    _, _, codec = entry_of("CODECS")
    state = {"a": size * draws(seed, 64).to(getattr(torch, dtype)), "zero": torch.zeros(3), "count": torch.tensor(7)}
    encoded = codec().encode(state, seed)
    assert encoded["a"].element_size() == 1 and encoded["count"] is state["count"]
    decoded = codec().decode(encoded, state)
    assert decoded.keys() == state.keys() and torch.equal(decoded["zero"], state["zero"])
    step = state["a"].abs().max().double() / 127
    rounding = {"float32": 1e-5, "bfloat16": 2**-8}[dtype] * state["a"].abs().max()
    assert decoded["a"].dtype == state["a"].dtype
    assert ((decoded["a"].double() - state["a"].double()).abs() <= step + rounding).all()


def test_the_codec_has_no_bias_and_leaves_what_is_strange() -> None:
    step = entry_of("CODECS")[2]()
    state = {"a": draws(0, 50)}
    mean = sum(step.decode(step.encode(state, seed), state)["a"].double() for seed in range(400)) / 400
    deviation = state["a"].abs().max() / 127 / 2 / 400**0.5  # at most, of a mean
    assert ((mean - state["a"]).abs() < 5 * deviation).all()
    for strange in ({"a": "text", "a/scale": torch.tensor(1.0)}, {"a": torch.ones(2)}, {"b": torch.ones(2)}):
        assert step.decode(strange, state) == strange


def test_the_codec_runs_a_federation(enter, make_trainer, plain) -> None:
    enter("CODECS")
    trainer = make_trainer(codecs={"int8": {}})
    trainer.train()
    assert differences(trainer, plain)
    ours, whole = (rounds_of(one)[-1]["bytes_up"] - 8 * 2 for one in (trainer, plain))
    scales = 4 * len(plain.federation.state) * 2
    assert ours == whole / 4 + scales


class Largest(Step):
    """A codec that changes shapes: the largest values, with where they were."""

    def encode(self, state: AdapterState, seed: int) -> AdapterState:
        places = {key: tensor.abs().flatten().topk(tensor.numel() // 8).indices for key, tensor in state.items()}
        values = {key: state[key].flatten()[place] for key, place in places.items()}
        return {**values, **{f"{key}/places": place.int() for key, place in places.items()}}

    def decode(self, state: AdapterState, like: Mapping[str, torch.Tensor]) -> AdapterState:
        return {
            key: torch.zeros_like(tensor)
            .flatten()
            .index_put((state[f"{key}/places"].long(),), state[key])
            .view_as(tensor)
            for key, tensor in like.items()
        }


def test_a_codec_may_change_shapes(make_trainer, plain, monkeypatch) -> None:
    monkeypatch.setitem(CODECS, "largest", Largest)
    trainer = make_trainer(codecs={"largest": {}}, num_rounds=1)
    start = trainer.federation.state
    trainer.train()
    for key, tensor in trainer.federation.state.items():
        changed, of_each = int((tensor != start[key]).sum()), tensor.numel() // 8
        is_left_factor = "lora_B" in key  # zero at first, so that the other one has no gradient yet
        assert of_each <= changed <= 2 * of_each if is_left_factor else changed == 0, key
    assert rounds_of(trainer)[0]["bytes_up"] - 16 == (rounds_of(plain)[0]["bytes_up"] - 16) / 4


class Compared(Step):
    """Sends all as it is, and compares what comes in with what it is told of it."""

    seen = 0

    def encode(self, state: AdapterState, seed: int) -> AdapterState:
        return state

    def decode(self, state: AdapterState, like: Mapping[str, torch.Tensor]) -> AdapterState:
        self.seen += len(state)
        assert {key: (t.shape, t.dtype) for key, t in state.items()} == {
            key: (like[key].shape, like[key].dtype) for key in state
        }
        return state


def test_a_codec_is_told_the_shapes_of_the_ranks_of_clients(make_trainer) -> None:
    trainer = make_trainer(aggregation="hetlora", client_settings={"client_0": {"r": 1}})
    step = Compared()
    trainer.client.plan.up.steps = trainer.client.plan.down.steps = [step]
    trainer.train()
    tensors = len(trainer.federation.state)
    assert step.seen == tensors * 2 * 2 * 2  # of two clients, in two rounds, down and up
    assert not rounds_of(trainer)[0]["refused"]


# A local objective


def test_the_objective_adds_the_mean_update_to_the_step_of_the_next_round(enter, make_trainer, plain) -> None:
    enter("LOCAL_OBJECTIVES")
    start, first = make_trainer(), make_trainer(num_rounds=1)
    first.train()
    trainer = make_trainer(local_objective="momentum", local_objective_kwargs={"alpha": 0.3})
    trainer.train()
    for key, tensor in trainer.federation.state.items():
        update = first.federation.state[key].double() - start.federation.state[key].double()
        expected = plain.federation.state[key].double() + 0.5 * 0.3 * update  # one step of SGD
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert differences(trainer, plain)


def test_the_objective_resumes_to_the_same_bits(enter, make_trainer, tmp_path) -> None:
    enter("LOCAL_OBJECTIVES")
    settings = {"local_objective": "momentum", "local_objective_kwargs": {"alpha": 0.3}, "num_rounds": 3}
    whole = make_trainer(**settings)
    whole.train()
    make_trainer(**(settings | {"num_rounds": 2, "output_dir": str(tmp_path)})).train()
    resumed = make_trainer(**settings, output_dir=str(tmp_path))
    resumed.train(resume_from_checkpoint=True)
    assert not differences(whole, resumed)


# A trainer


def test_the_trainer_evaluates_what_is_generated(monkeypatch, tiny_model_dir, tmp_path) -> None:
    config = importlib.import_module("fed_trainer.config")
    namespace = dict(vars(config))
    exec(BLOCKS[TRAINER[0]], namespace)
    kind = namespace["FederatedSeq2SeqConfig"]
    monkeypatch.setattr(config, "FederatedSeq2SeqConfig", kind, raising=False)
    trainer_class = load(TRAINER[1]).FederatedSeq2SeqTrainer
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[5, 6, 7, 8]] * 4})
    generated: list[Any] = []

    def measured(prediction: Any) -> dict[str, float]:
        generated.append(prediction.predictions)
        return {"length": float((prediction.predictions != 2).sum(1).max())}  # without the padding

    def build(args: Any) -> Any:
        return trainer_class(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            args=args,
            train_dataset={"a": rows, "b": rows},
            eval_dataset=rows.select(range(2)),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
            peft_config=LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"),
            compute_metrics=measured,
        )

    args = {**CONFIG, "output_dir": str(tmp_path), "eval_on_start": False}
    trainer = build(kind(**args, predict_with_generate=True, generation_max_length=6))
    trainer.train()
    assert generated and generated[-1][:, :4].tolist() == [[5, 6, 7, 8]] * 2
    assert rounds_of(trainer)[-1]["eval"]["eval_length"] == 6
    with pytest.raises(TypeError, match="`args` should be a `FederatedSeq2SeqConfig`"):
        build(FederatedTaskConfig(**args))


# An engine


def test_the_engine_is_chosen_for_its_launch_and_trains_as_the_plain_one(
    enter, make_trainer, plain, monkeypatch
) -> None:
    engine = enter("ENGINES")
    assert type(engine_of(SimpleNamespace(distributed_type=DistributedType.XLA))) is engine
    monkeypatch.setitem(ENGINES, DistributedType.NO, engine)  # there is no TPU here
    trainer = make_trainer()
    trainer.train()
    assert type(trainer._engine) is engine and not differences(trainer, plain)
    with pytest.raises(NotImplementedError, match="reads the optimiser after every client"):
        make_trainer(keep_optimizer_state=True)


# A transport


def test_clients_elsewhere_give_the_same_bits(make_trainer, plain, tmp_path) -> None:
    folder = load(TRANSPORT)
    here, elsewhere = make_trainer(client_timeout=60), make_trainer()  # so that it fails, and does not hang
    here.federation.transport = folder.Folder(tmp_path)
    here.client.turn = None  # nobody has a turn here

    def clients() -> None:
        for _ in range(2):
            for client in ("client_0", "client_1"):
                folder.answer(tmp_path, client, elsewhere.client.turn)

    thread = threading.Thread(target=clients, daemon=True)
    thread.start()
    here.train()
    thread.join()
    assert not differences(here, plain)
    rounds: tuple[list[Mapping[str, Any]], ...] = (rounds_of(here), rounds_of(plain))
    for ours, theirs in zip(*rounds, strict=True):
        assert ours["train_loss"] == theirs["train_loss"] and ours["clients"].keys() == theirs["clients"].keys()
        assert (ours["bytes_up"], ours["bytes_down"]) == (theirs["bytes_up"], theirs["bytes_down"])


def test_a_method_that_trains_base_weights_goes_to_no_client_elsewhere(make_trainer, tmp_path) -> None:
    trainer = make_trainer(aggregation="slora", aggregation_kwargs={"sparse_rounds": 1}, client_timeout=1)
    trainer.federation.transport = load(TRANSPORT).Folder(tmp_path)
    with pytest.raises(NotImplementedError, match="'slora'` trains base weights in a first stage, which Folder does"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_a_client_elsewhere_that_fails_or_is_late_costs_only_its_own_update(tmp_path) -> None:
    folder = load(TRANSPORT)

    def fails(packet: Packet) -> Packet:
        raise TurnFailedError("its local round failed", {})

    packets = {client: Packet("train", meta={"client": client, "round": 3}) for client in ("late", "fails", "works")}
    folder.put(tmp_path / "late.2.update", Packet("update"))  # of a round that is over
    turns = {"fails": fails, "works": lambda packet: Packet("update", meta=packet.meta)}
    for client, turn in turns.items():
        thread = threading.Thread(target=folder.answer, args=(tmp_path, client, turn), daemon=True)
        thread.start()
    replies = {reply.client: reply for reply in folder.Folder(tmp_path).exchange(packets, 3, timeout=0.5)}
    assert {client: reply.status for client, reply in replies.items()} == {
        "late": "timeout", "fails": "error", "works": "ok",
    }  # fmt: skip
    assert replies["late"].reason == "it has not answered in time"
    assert replies["fails"].reason == "its local round failed"
    assert replies["works"].packet.meta == {"client": "works", "round": 3}
