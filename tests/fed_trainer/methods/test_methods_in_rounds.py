# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every aggregation method, server optimiser and local objective in the rounds of a trainer."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from fed_trainer.methods.aggregation import METHODS
from helpers.comparison import same, weights_in
from helpers.local_rounds import after_local_rounds, kept_by
from helpers.runs import DiesAtStep
from peft_scl import FederaConfig, SclConfig


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
NEEDED = {
    "norm_bounding": {"max_norm": 0.1},
    "slora": {"sparse_rounds": 1, "density": 0.1},
    "trimmed_mean": {"trim": 0.34},
}
KRUM = {"num_byzantine": 0}
NEEDED |= {"krum": KRUM, "multi_krum": KRUM}
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


def unequal(make_clients):
    clients = make_clients(num_clients=3)
    clients["client_1"] = clients["client_1"].select(range(6))
    return clients


@pytest.fixture
def make_trainer(make_trainer, make_clients):
    return partial(make_trainer, clients=unequal(make_clients), adapter=LORA, eval_on_start=False)


def needed(method):
    return {"aggregation": method, "aggregation_kwargs": NEEDED.get(method)}


@torch.no_grad()
def effective_weights(model):
    """`W + change` of every adapted module, dense, `(out, in)`, in float64, by the formulas of the papers."""
    weights = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            change = B @ A
            if getattr(module, "keep_base", {}).get("default"):  # otherwise the base holds the residual
                change -= module.lora_start_B["default"].double() @ module.lora_start_A["default"].double()
        elif hasattr(module, "scl_A"):
            A0, B0 = module.scl_start_A["default"].double(), module.scl_start_B["default"].double()
            A, B = module.scl_A["default"].weight.double(), module.scl_B["default"].weight.double()
            change = (B0 + B) @ (A0 + A) - B0 @ A0
        else:
            continue
        weights[name] = module.get_base_layer().weight.double() + module.scaling["default"] * change
    assert weights
    return weights


class Watch:
    """Keeps what clients ended with: their model, dense, and their state."""

    def __init__(self, trainer, monkeypatch):
        self.weights, self.states, self.starts = [], [], []

        def look(task, trained):
            self.starts.append({key: tensor.clone() for key, tensor in task.state.items()})
            self.weights.append(effective_weights(trainer.model))
            self.states.append({key: tensor.clone() for key, tensor in trained.state.items()})

        after_local_rounds(monkeypatch, trainer, look)


def mean(dictionaries, weights):
    total = sum(weights)
    return {
        key: sum(weight / total * values[key].double() for weight, values in zip(weights, dictionaries, strict=True))
        for key in dictionaries[0]
    }


class AfterRound(TrainerCallback):
    def __init__(self, check):
        self.check = check
        self.rounds = 0

    def on_save(self, args, state, control, **kwargs):
        self.rounds += 1
        self.check(state.global_step)


ADAPTERS = {
    "lora": lambda: LoraConfig(**LORA),
    "rslora": lambda: LoraConfig(**LORA, use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 3}),
    "federa": lambda: FederaConfig(**LORA),
    "federa_keep_base": lambda: FederaConfig(**LORA, keep_base=True),
    "scl": lambda: SclConfig(r=4, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.fast(adapter_kind=["lora", "federa", "scl"])
@pytest.mark.parametrize("adapter_kind", ADAPTERS)
@pytest.mark.parametrize("method", ["ffa_lora", "rolora", "flora", "fedex_lora"])
def test_the_model_of_every_round_is_the_mean_of_the_clients_models(make_trainer, monkeypatch, method, adapter_kind):
    """Dense, in float64, with unequal weights, over three rounds."""
    checks = []

    def check(round):
        expected = mean(watch.weights[-3:], [16, 6, 16])
        for name, weight in effective_weights(trainer.model).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(float((watch.weights[-3][name] - expected[name]).abs().max()) for name in expected)
        checks.append(moved)

    trainer = make_trainer(
        num_rounds=3, callbacks=[AfterRound(check)], peft_config=ADAPTERS[adapter_kind](), **needed(method)
    )
    watch = Watch(trainer, monkeypatch)
    trainer.train()
    assert len(checks) == 3
    assert min(checks) > 1e-4, "the clients do not differ, so the test shows nothing"


def test_fedavg_of_a_lora_is_not_the_mean_of_the_clients_models(make_trainer, monkeypatch):
    """What the methods above are for."""
    trainer = make_trainer(num_rounds=2)
    watch = Watch(trainer, monkeypatch)
    trainer.train()
    expected, found = mean(watch.weights[-3:], [16, 6, 16]), effective_weights(trainer.model)
    assert max((found[name] - expected[name]).abs().max() for name in found) > 1e-4


def test_flexlora_keeps_the_best_approximation_of_the_mean(make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=2, aggregation="flexlora")
    base = effective_weights(trainer.model)  # B = 0
    watch = Watch(trainer, monkeypatch)
    trainer.train()
    expected = mean(watch.weights[-3:], [16, 6, 16])
    for name, weight in effective_weights(trainer.model).items():
        u, s, vt = torch.linalg.svd(expected[name] - base[name])
        best = (u[:, :4] * s[:4]) @ vt[:4]
        torch.testing.assert_close(weight - base[name], best, rtol=1e-4, atol=1e-6)


@pytest.mark.fast(adapter_kind=["lora", "federa"])
@pytest.mark.parametrize("adapter_kind", ADAPTERS)
@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_what_was_added_to_the_base_is_in_the_published_adapter(
    make_trainer, tiny_model_dir, tmp_path, method, adapter_kind
):
    """Stock PEFT, the untouched base model, one folder."""
    trainer = make_trainer(num_rounds=2, peft_config=ADAPTERS[adapter_kind](), **needed(method))
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    inputs = torch.arange(40).view(2, 20)
    for folder in ("out", "out/checkpoint-2"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / folder)
        with torch.no_grad():
            expected = trainer.model.eval()(inputs).logits
            torch.testing.assert_close(loaded(inputs).logits, expected, rtol=1e-4, atol=1e-4)
            assert (base(inputs).logits - expected).abs().max() > 1e-2


VARIANTS = {
    **{method: needed(method) for method in METHODS},
    "fedavgm": {"server_optimizer": "fedavgm"},
    "fedadam": {"server_optimizer": "fedadam", "server_lr": 0.02, "server_optimizer_kwargs": {"tau": 1e-2}},
    "fedyogi": {"server_optimizer": "fedyogi"},
    "fedadagrad": {"server_optimizer": "fedadagrad"},
    "rolora with fedadam": {"aggregation": "rolora", "server_optimizer": "fedadam"},
    "fedprox": {"local_objective": "fedprox", "local_objective_kwargs": {"mu": 0.1}},
    "scaffold": {"local_objective": "scaffold", **SGD},
    "feddyn": {"local_objective": "feddyn", "local_objective_kwargs": {"alpha": 0.1}},
    "ditto": {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}},
    "hetlora with pruning": {
        "aggregation": "hetlora",
        "local_objective": "rank_pruning",
        "local_objective_kwargs": {"decay": 0.5, "penalty_weight": 10.0},
    },
    "flora of ranks": {"aggregation": "flora", "client_settings": {"client_0": {"r": 1}, "client_2": {"r": 3}}},
    "layers and steps": {
        "aggregation": "fednova",
        "client_settings": {"client_0": {"layers_to_transform": [0]}, "client_1": {"max_steps": 1}},
    },
}


@pytest.mark.fast("fedavg", "slora", "scaffold", "ditto")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_to_the_same_bits(make_trainer, make_clients, tmp_path, variant):
    clients = make_clients(num_clients=4)
    settings = {
        "clients": clients,
        "num_rounds": 3,
        "clients_per_round": 3,
        "eval_dataset": {name: rows.select(range(4)) for name, rows in clients.items()},
        **VARIANTS[variant],
    }
    whole = make_trainer("whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("killed", callbacks=[DiesAtStep(15)], **settings).train()
    trainer = make_trainer("killed", **settings)
    trainer.train(resume_from_checkpoint=True)

    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "killed"))
    assert same(whole.federation.state, trainer.federation.state)
    for left, right in zip(whole.record["rounds"], trainer.record["rounds"], strict=True):
        assert left["client_eval"] == right["client_eval"]
        assert left["clients"].keys() == right["clients"].keys()
        assert (left["bytes_up"], left["bytes_down"]) == (right["bytes_up"], right["bytes_down"])
    for client in clients:
        ours, theirs = kept_by(whole, client), kept_by(trainer, client)
        assert ours.keys() == theirs.keys()
        assert all(same(ours[part], theirs[part]) for part in ours)
    files = [sorted(path.name for path in (tmp_path / out).rglob("*.safetensors")) for out in ("whole", "killed")]
    assert files[0] == files[1]


OBJECTIVES = {
    "fedprox": {"local_objective_kwargs": {"mu": 0.1}},
    "scaffold": SGD,
    "ditto": {"local_objective_kwargs": {"mu": 0.1}},
    "feddyn": {"local_objective_kwargs": {"alpha": 0.1}},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_needs_no_more_than_the_tensors_that_are_shared(make_trainer, objective):
    for method in ["rolora", "ffa_lora", "fedsa_lora", *(["slora"] if objective == "fedprox" else [])]:
        trainer = make_trainer(
            method,
            clients=None,
            kind="task",
            adapter={"r": 2, "target_modules": ["query"]},
            local_objective=objective,
            **needed(method),
            **OBJECTIVES[objective],
        )
        trainer.train()
        assert [len(entry["clients"]) for entry in trainer.record["rounds"]] == [3, 3], method
        assert all(not entry["refused"] for entry in trainer.record["rounds"]), method
