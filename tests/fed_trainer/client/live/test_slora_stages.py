# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""SLoRA on a live model: the sparse change of stage 1, the LoRA that starts from it, and the engine between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from fed_trainer import ClientUpdate, FederatedTrainer
from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.base_model import base_digest
from fed_trainer.client.live.pairs import factor_pairs
from fed_trainer.client.live.sparse_change import LiveSparseChange, SparseChange
from fed_trainer.methods.aggregation import FedAvg, shared_mask
from fed_trainer.state.adapter_state import subtract
from helpers.comparison import same
from helpers.local_rounds import local_round
from helpers.runs import DiesAtStep
from peft_scl import FederaConfig, SclConfig


TOKENS = torch.arange(4, 20).view(2, 8)
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}  # `v_proj` and `c_attn` are not square
both = pytest.mark.parametrize("architecture", list(TARGETS))


def base_of(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if architecture == "llama":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).to(dtype)


def lora_on(base: PreTrainedModel, architecture: str, seed: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=TARGETS[architecture], **settings)
    return get_peft_model(base, config).eval()


def stage_1(model: PeftModel, density: float = 0.1, seed: int = 3) -> LiveSparseChange:
    return LiveSparseChange(model, factor_pairs(model), density, seed)


def fill(live: LiveSparseChange, seed: int = 1) -> None:
    """Values as training might leave them; those of zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    live.write({key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in live.read().items()})


def changes(model: PeftModel) -> dict[str, SparseChange]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseChange)}


def everything(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Modules and parameters in their order, as objects, with all else that they hold."""
    inside = ("_parameters", "_modules", "_buffers")
    modules = {
        name: (id(module), type(module), repr({k: v for k, v in vars(module).items() if k not in inside}))
        for name, module in model.named_modules()
    }
    tensors = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    return {**modules, **tensors, "order": (*modules, *tensors)}


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {key: tensor.contiguous().view(torch.uint8).tolist() for key, tensor in model.state_dict().items()}


# The sparse change


@both
def test_gradient_of_the_values_is_the_dense_gradient_at_the_mask(tiny_model_dir: Path, architecture: str) -> None:
    model = lora_on(base_of(architecture, tiny_model_dir), architecture)
    live = stage_1(model)
    fill(live)
    model.double()  # the values too
    model(TOKENS, labels=TOKENS).loss.backward()

    dense = base_of(architecture, tiny_model_dir).double().eval()
    for pair in factor_pairs(lora_on(base_of(architecture, tiny_model_dir), architecture)):
        weight = dense.get_submodule(pair.module).weight
        indices = shared_mask(pair.module, weight.shape, 0.1, 3)
        with torch.no_grad():
            weight.view(-1)[indices] += live.read()[f"base_model.model.{pair.module}.sparse_values"]
    expected = dense(TOKENS, labels=TOKENS).loss
    expected.backward()
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, expected, rtol=1e-12, atol=0)
    assert len(changes(model)) == len(TARGETS[architecture]) * 2
    for name, change in changes(model).items():
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        gradient = dense.get_submodule(path).weight.grad.flatten()[change.indices]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(change.trained.grad, gradient, rtol=1e-9, atol=1e-15)


@both
def test_training_reaches_the_values_and_nothing_else(tiny_model_dir: Path, architecture: str) -> None:
    model = lora_on(base_of(architecture, tiny_model_dir), architecture)
    before, digest = bits(model), base_digest(model)
    live = stage_1(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {id(parameter) for parameter in trained} == {id(change.trained) for change in changes(model).values()}
    assert sum(v.numel() for v in live.read().values()) == sum(p.numel() for p in trained)
    assert base_digest(model) == digest
    for change in changes(model).values():
        assert change.dense().count_nonzero() == len(change.indices) == round(0.1 * change.weight.numel())
    live._detach()  # without the start of LoRA
    assert bits(model) == before


def test_a_change_below_the_resolution_of_bfloat16_adds_up() -> None:
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(layer.weight, 1.0)
    change = SparseChange(layer, "default", torch.arange(5))
    for _ in range(4):
        change.trained.data += 2**-10 + 2**-18  # in the end a little more than half a unit in the last place
    x = torch.eye(8, dtype=torch.bfloat16)
    assert change.trained.dtype == torch.float32
    assert torch.equal(change(x).T, (layer.weight.float() + change.dense()).bfloat16())
    assert change(x).max() > 1


def test_disable_adapter_is_the_pretrained_model(tiny_model_dir: Path) -> None:
    expected = base_of("llama", tiny_model_dir)(TOKENS).logits
    model = lora_on(base_of("llama", tiny_model_dir), "llama")
    live = stage_1(model)
    assert torch.equal(model(TOKENS).logits, expected)
    fill(live)
    changed, flags = model(TOKENS).logits, [parameter.requires_grad for parameter in model.parameters()]
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS).logits, changed)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags  # LoRA did not come back


def test_fedavg_of_the_values_is_the_dense_mean_of_the_changes(tiny_model_dir: Path) -> None:
    model = lora_on(base_of("llama", tiny_model_dir), "llama")
    live = stage_1(model)
    fill(live)
    start, rule = live.read(), FedAvg()
    rule.begin(start)
    mean = {name: torch.zeros(change.weight.shape, dtype=torch.float64) for name, change in changes(model).items()}
    for client, num_examples in ((0, 3), (1, 5)):
        fill(live, seed=10 + client)
        for name, change in changes(model).items():
            mean[name] += num_examples / 8 * change.dense().double()
        rule.add(ClientUpdate(str(client), num_examples, subtract(live.read(), start), {}))
    delta = rule.finish()
    live.write({key: tensor + delta[key] for key, tensor in start.items()})
    for name, change in changes(model).items():
        torch.testing.assert_close(change.dense().double(), mean[name], rtol=0, atol=1e-7)


# The start of LoRA


@both
def test_lora_starts_from_the_svd_of_the_change(tiny_model_dir: Path, architecture: str) -> None:
    model = lora_on(base_of(architecture, tiny_model_dir), architecture)
    before = everything(model)
    weights = {name: tensor for name, tensor in bits(model).items() if "lora_" not in name}
    pairs = factor_pairs(model)
    live = LiveSparseChange(model, pairs, 0.1, 3)
    fill(live)
    dense = {name.removesuffix(".base_layer"): change.dense().double() for name, change in changes(model).items()}
    errors = live.finish()
    assert everything(model) == before
    assert {name: tensor for name, tensor in bits(model).items() if "lora_" not in name} == weights

    state = LiveAdapter(model).read()
    plain = base_of(architecture, tiny_model_dir).eval()
    for pair in pairs:
        change = dense[f"base_model.model.{pair.module}"]
        change = change.T if pair.transposed else change
        u, s, vt = torch.linalg.svd(change)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        product = pair.scaling * state[pair.key_B].double() @ state[pair.key_A].double()
        torch.testing.assert_close(product, best, rtol=0, atol=1e-6)
        assert errors[pair.module] == pytest.approx(float((change - best).norm() / change.norm()), rel=1e-4)
        assert 0 < errors[pair.module] < 1
        with torch.no_grad():
            plain.get_submodule(pair.module).weight += (best.T if pair.transposed else best).float()
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-6)


def test_an_adapter_can_be_saved_in_stage_1(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = lora_on(base_of("llama", tiny_model_dir), "llama")
    live = stage_1(model)
    fill(live)
    state, inside, logits = live.read(include_frozen=True), everything(model), model(TOKENS).logits
    with live.publishable():
        model.save_pretrained(tmp_path)
    assert everything(model) == inside
    assert same(live.read(include_frozen=True), state)
    assert torch.equal(model(TOKENS).logits, logits)

    loaded = PeftModel.from_pretrained(base_of("llama", tiny_model_dir), tmp_path).eval()
    live.finish()
    assert same(load_file(tmp_path / "adapter_model.safetensors"), LiveAdapter(model).read())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_saved_state_goes_on_elsewhere_with_the_same_start_of_lora(tiny_model_dir: Path) -> None:
    first, second = (lora_on(base_of("llama", tiny_model_dir), "llama", seed=seed) for seed in (0, 7))
    live, restored = stage_1(first), stage_1(second)
    fill(live)
    only = next(iter(live.read()))
    live.write({key: torch.zeros_like(tensor) for key, tensor in live.read().items() if key != only})
    restored.load(live.read(include_frozen=True), "The checkpoint")
    live.finish()
    restored.finish()
    assert same(LiveAdapter(first).read(), LiveAdapter(second).read())  # the random `A` where nothing changed, too
    with pytest.raises(ValueError, match="The checkpoint does not fit: .*sparse_values has the shape"):
        model = lora_on(base_of("llama", tiny_model_dir), "llama")
        stage_1(model, density=0.2).load(live.read(include_frozen=True), "The checkpoint")


def test_a_head_is_trained_in_both_stages() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = lora_on(LlamaForSequenceClassification(config), "llama", task_type="SEQ_CLS", bias="all")
    head = "base_model.model.score.weight"
    both_stages = {key for key in LiveAdapter(model).read() if ".lora_" not in key}
    assert head in both_stages
    live = stage_1(model)
    sent = live.read()
    assert sent.keys() - both_stages == {key for key in sent if key.endswith(".sparse_values")}
    assert both_stages < sent.keys()
    model(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    assert model.get_submodule("base_model.model.score.modules_to_save.default").weight.grad.abs().max() > 0
    fill(live)
    trained = live.read()[head]
    live.finish()
    assert torch.equal(LiveAdapter(model).read()[head], trained)


def tied(folder: Path) -> PeftModel:
    base = base_of("llama", folder)
    layers = base.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    return lora_on(base, "llama")


def with_config(make: Callable[[], PeftConfig]) -> Callable[[Path], PeftModel]:
    return lambda folder: get_peft_model(base_of("llama", folder), make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_config(lambda: FederaConfig(r=4, target_modules=["q_proj"])), "is not a plain LoRA"),
        (with_config(lambda: SclConfig(r=4)), "for model.layers.0.mlp.down_proj the adapter is not a plain LoRA"),
        (with_config(lambda: LoraConfig(target_modules=["q_proj", "embed_tokens"])), "of type Embedding"),
        (with_config(lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="olora")), "`B` is not zero"),
        (tied, "tied to another module"),
    ],
)
def test_what_has_no_sparse_stage_is_refused(
    tiny_model_dir: Path, make: Callable[[Path], PeftModel], message: str
) -> None:
    model = make(tiny_model_dir)
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        stage_1(model)
    assert everything(model) == before


# The engine


pytestmark = pytest.mark.trainer(
    output=".",
    adapter={"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    num_clients=2,
    max_steps=3,
    weight_decay=0.1,
    gradient_checkpointing=True,
)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": False}])
def test_one_trainer_goes_through_both_stages(
    make_trainer: Callable[..., FederatedTrainer], settings: dict[str, bool]
) -> None:
    trainer = make_trainer(**settings)
    data, engines = trainer.client.data.prepared("client_0"), []
    create = trainer.create_optimizer
    trainer.create_optimizer = lambda *args: engines.append(trainer.optimizer is None) or create(*args)

    live = trainer._live_adapter = stage_1(trainer.model, density=0.05)
    start = live.read()
    once, metrics = local_round(trainer, start, data, 0)
    again, same_metrics = local_round(trainer, start, data, 0)
    assert same(once, again) and once.keys() == start.keys()
    assert metrics["train_loss"] == same_metrics["train_loss"]
    assert all(tensor.count_nonzero() == tensor.numel() for tensor in once.values())
    after_one = hooks(trainer.model)
    _, later = local_round(trainer, once, data, 1)
    assert later["train_loss"] < metrics["train_loss"]

    live.write(once)
    live.finish()
    trainer._drop_engine()
    live = trainer._live_adapter = LiveAdapter(trainer.model)
    start = live.read()
    trained, _ = local_round(trainer, start, data, 2, None, 0.5)
    again, _ = local_round(trainer, start, data, 2, None, 0.5)
    assert engines == [True, True]
    assert len(trainer.accelerator._optimizers) == len(trainer.accelerator._models) == 1  # the old ones are gone
    assert hooks(trainer.model) == after_one

    fresh = make_trainer(**settings)
    expected, _ = local_round(fresh, start, data, 2, None, 0.5)
    assert not same(expected, start)
    assert same(trained, expected) and same(again, expected)


class Interruption(BaseException):  # an `Exception` would be a failure of the client
    pass


# two rounds of two clients of three steps in either stage
@pytest.mark.fast("2", "14")
@pytest.mark.parametrize("step", [2, 8, 14, 20])
def test_a_trainer_that_was_interrupted_in_either_stage_goes_on_itself(
    make_trainer: Callable[..., FederatedTrainer], tmp_path: Path, step: int
) -> None:
    settings = {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 2}, "num_rounds": 4}
    whole = make_trainer(**settings)
    whole.train()
    shutil.rmtree(tmp_path)

    trainer = make_trainer(**settings)
    trainer.add_callback(DiesAtStep(step, Interruption))
    with pytest.raises(Interruption):
        trainer.train()
    trainer.train(resume_from_checkpoint=step > 6)
    assert same(trainer.federation.state, whole.federation.state)
    assert trainer.record["sparse_stage"] == whole.record["sparse_stage"]
