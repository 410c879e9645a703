# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Factor pairs read off live models, and rules on them, against the dense changes of weight that PEFT and SCL compute.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fed_trainer.client.live import pairs as live_pairs
from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.facts import check_adapter
from fed_trainer.client.live.pairs import add_to_base, factor_pairs
from fed_trainer.methods.aggregation import METHODS, ClientUpdate
from fed_trainer.state.adapter_state import AdapterState, subtract
from fed_trainer.state.factors import FactorPair, truncate_ranks
from fed_trainer.state.low_rank import LowRank
from peft_scl import FederaConfig, SclConfig


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

NUM_EXAMPLES = (3, 50, 200)


class Net(nn.Module):
    """One layer of every kind that LoRA adapts, none square but `square`, and an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.c_proj = Conv1D(7, 10)
        self.square = nn.Linear(7, 7)
        self.square_conv = Conv1D(7, 7)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.square_conv(self.square(self.c_proj(self.up(self.embed(x)).relu()))))


LORA_TARGETS = ["embed", "up", "c_proj", "square", "square_conv"]


def net(config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), config)


def lora(**kwargs: Any) -> PeftModel:
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": LORA_TARGETS, "fan_in_fan_out": False}
    return net(LoraConfig(**{**settings, **kwargs}))


def scl(**kwargs: Any) -> PeftModel:
    return net(
        SclConfig(
            **{"r": 2, "target_modules": ["c_proj"], "scaling": 0.5, "modules_to_save": ["classifier"], **kwargs}
        )
    )


def randomise(adapter: LiveAdapter, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in adapter.read().items()}


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Every adapted weight with its adapter, as PEFT computes it, in float64 and the layout of the base layer."""
    return {
        name: layer.get_base_layer().weight.detach().double() + layer.get_delta_weight("default").detach().double()
        for name, layer in adapted_layers(model).items()
    }


def test_pairs_name_the_tensors_and_scalings_of_lora() -> None:
    model = lora(rank_pattern={"up": 4}, alpha_pattern={"square": 7}, modules_to_save=["classifier"])
    pairs = {pair.module: pair for pair in factor_pairs(model)}
    assert {name: pair.scaling for name, pair in pairs.items()} == {
        "embed": 1.5, "up": 0.75, "c_proj": 1.5, "square": 3.5, "square_conv": 1.5,
    }  # fmt: skip
    assert {name for name, pair in pairs.items() if pair.transposed} == {"embed", "c_proj", "square_conv"}
    state = LiveAdapter(model).read()
    assert {key for pair in pairs.values() for key in (pair.key_A, pair.key_B)} == {
        key for key in state if ".classifier." not in key
    }
    for name, layer in adapted_layers(model).items():
        pair = pairs[name]
        assert state[pair.key_A].shape == (layer.r["default"], layer.in_features)
        assert state[pair.key_B].shape == (layer.out_features, layer.r["default"])


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert {pair.scaling for pair in factor_pairs(lora(use_rslora=True))} == {3 / math.sqrt(2)}


def federa(**kwargs: Any) -> PeftModel:
    return net(FederaConfig(**{"r": 2, "lora_alpha": 3, "target_modules": LORA_TARGETS, **kwargs}))


MODELS = {
    "federa": federa,
    "federa with the base kept": lambda: federa(keep_base=True, use_rslora=True),
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True, rank_pattern={"up": 3}),
    "scl": scl,
    "scl with bottleneck": lambda: scl(variant="bottleneck", train_down_proj="none"),
    "scl without residual": lambda: scl(keep_residual=False),
}


FOLDABLE = ("lora", "rslora", "scl", "federa", "federa with the base kept")


@pytest.mark.parametrize("name", MODELS)
def test_description_gives_the_change_that_the_layer_computes(name: str) -> None:
    model = MODELS[name]()
    adapter = LiveAdapter(model)
    before = weights_of(model)  # those of the base model: every adapter starts without a change, or is `unfoldable`
    state = randomise(adapter, 1)
    adapter.write(state)
    weights = weights_of(model)
    for pair in factor_pairs(model):
        A, B = (state[key].double() for key in (pair.key_A, pair.key_B))
        base = before[pair.module].T if pair.transposed else before[pair.module]
        product = B @ A
        if pair.start is not None:
            start_A, start_B = (tensor.double() for tensor in pair.start)
            if pair.trains_change:
                A, B = A + start_A, B + start_B
            product = B @ A - start_B @ start_A
        if name == "scl with bottleneck":  # in front of the weight
            expected = base @ (torch.eye(base.shape[1]) + pair.scaling * product)
        elif name == "scl without residual":  # in its place
            expected = pair.scaling * product
        else:
            expected = base + pair.scaling * product
        ours = weights[pair.module].T if pair.transposed else weights[pair.module]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [MODELS[kind] for kind in FOLDABLE], ids=FOLDABLE)
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_model_has_the_mean_of_the_clients_weights_after_every_round(name: str, build) -> None:
    model = build()
    adapter, pairs = LiveAdapter(model), factor_pairs(model)
    rule = METHODS[name].build(pairs)
    state = randomise(adapter, 1)
    for round in (1, 2, 3):
        rule.begin(state, round)
        expected: dict[str, torch.Tensor] = {}
        for index, number in enumerate(NUM_EXAMPLES):
            local = randomise(adapter, 10 * round + index)
            adapter.write(local)
            share = number / sum(NUM_EXAMPLES)
            expected = {key: expected.get(key, 0) + share * weight for key, weight in weights_of(model).items()}
            rule.add(ClientUpdate(str(index), number, subtract(local, state)))
        delta = rule.finish()
        state = {key: tensor + delta[key] for key, tensor in state.items()}
        adapter.write(state)
        add_to_base(model, rule.base_change, pairs)
        for key, weight in weights_of(model).items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-4)


def test_fedex_residual_is_not_transposed_on_square_linear_layers() -> None:
    """
    Trap: the repository of FedEx-LoRA adds the transposed residual, right for the `Conv1D` of GPT-2, wrong for
    `nn.Linear`, and silent on square weights, where the shapes agree. There it is worse than not correcting at all.
    """
    model = lora(target_modules=["square", "square_conv"])
    adapter, pairs = LiveAdapter(model), factor_pairs(model)
    state, rule = adapter.read(), METHODS["fedex_lora"].build(pairs)
    rule.begin(state)
    expected: dict[str, torch.Tensor] = {}
    for index in range(3):
        local = randomise(adapter, index)
        adapter.write(local)
        expected = {key: expected.get(key, 0) + weight / 3 for key, weight in weights_of(model).items()}
        rule.add(ClientUpdate(str(index), 1, subtract(local, state)))
    delta = rule.finish()
    adapter.write({key: tensor + delta[key] for key, tensor in state.items()})
    uncorrected = weights_of(model)
    add_to_base(model, rule.base_change, pairs)
    corrected = weights_of(model)
    for key, weight in expected.items():
        torch.testing.assert_close(corrected[key], weight, rtol=0, atol=1e-5)
        residual = corrected[key] - uncorrected[key]
        assert (uncorrected[key] + residual.T - weight).norm() > (uncorrected[key] - weight).norm()


def test_base_changes_come_in_the_layout_of_the_layer() -> None:
    model = lora()
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in adapted_layers(model).items()}
    pairs = factor_pairs(model)
    change = {}
    for pair in pairs:
        layer = adapted_layers(model)[pair.module]
        change[pair.module] = torch.randn(layer.out_features, 3), torch.randn(3, layer.in_features)
    add_to_base(model, change, pairs)
    for pair in pairs:
        left, right = change[pair.module]
        added = adapted_layers(model)[pair.module].get_base_layer().weight - before[pair.module]
        torch.testing.assert_close(added.T if pair.transposed else added, left @ right, rtol=0, atol=1e-5)


# What is not a product of two factors is refused, with the reason


REFUSED = {
    "DoRA": (lambda: lora(use_dora=True, target_modules=["up"]), "up has a LoRA variant .* not linear in the product"),
    "lora_bias": (lambda: lora(lora_bias=True, target_modules=["up"]), "up has `lora_bias=True`"),
    "activation": (lambda: scl(activation="gelu"), "c_proj has the activation 'gelu' between its factors"),
    "scl_bias": (lambda: scl(scl_bias=True), "c_proj has `scl_bias=True`"),
    "trained down projection": (lambda: scl(variant="bottleneck"), "c_proj trains the down projection"),
    "VeRA": (lambda: net(VeraConfig(r=2, target_modules=["up"])), "up has an adapter of type .*use|Aggregate"),
}


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_adapters_that_are_no_products_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factor_pairs(build())


def test_convolutions_are_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"0 is adapted by peft.tuners.lora.layer.Conv2d"):
        factor_pairs(model)


def test_prompt_learning_has_no_pairs() -> None:
    model = lora(target_modules=["up"])
    model.base_model.model.up = model.base_model.model.up.get_base_layer()
    with pytest.raises(ValueError, match="has no pair of low-rank factors"):
        factor_pairs(model)


def test_trainable_tokens_beside_the_factors_are_averaged_as_they_are() -> None:
    model = lora(target_modules=["up"], trainable_token_indices={"embed": [1, 2]})
    assert [pair.module for pair in factor_pairs(model)] == ["up"]


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
@pytest.mark.parametrize(
    "build, reason",
    [
        (MODELS["scl with bottleneck"], "acts on the input of the down projection"),
        (MODELS["scl without residual"], "replaces the base weight"),
    ],
    ids=["bottleneck", "without residual"],
)
def test_rules_that_add_to_the_base_refuse_scl_without_a_base_to_add_to(name: str, build, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' adds to the base weights, but for c_proj .*{reason}"):
        METHODS[name].build(factor_pairs(build()))


def test_tied_weights_are_not_added_to() -> None:
    base = Net()
    base.head = nn.Linear(6, 11, bias=False)
    base.head.weight = base.embed.weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed", "up"]))
    pairs = {pair.module: pair for pair in factor_pairs(model)}
    assert "tied to another module" in pairs["embed"].unfoldable
    assert pairs["up"].unfoldable is None
    with pytest.raises(ValueError, match="embed its base weight is tied"):
        add_to_base(model, {"embed": (torch.zeros(6, 1), torch.zeros(1, 11))}, list(pairs.values()))


def test_offloaded_base_weights_are_not_added_to() -> None:
    """On the meta device an addition would do nothing, and say nothing."""
    model = lora(target_modules=["up"])
    model.base_model.model.up.base_layer.to("meta")
    with pytest.raises(ValueError, match="up its base weight is offloaded"):
        check_adapter("flora", model)


def test_base_in_float64_is_not_rounded_to_float32() -> None:
    model = lora(target_modules=["up"])
    layer = model.base_model.model.up.base_layer.double()
    with torch.no_grad():
        layer.weight.fill_(1 / 3)
    add_to_base(model, {"up": LowRank(torch.zeros(10, 1), torch.zeros(1, 6))}, factor_pairs(model))
    assert (layer.weight == torch.tensor(1 / 3, dtype=torch.float64)).all()


def test_factors_tied_to_each_other_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    settings = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(LlamaForCausalLM(config), settings)
    with pytest.raises(ValueError, match="lm_head.* is the same memory as .*embed_tokens.*`ensure_weight_tying`"):
        factor_pairs(model)


# Whether a method fits an adapter


def test_ffa_refuses_dora() -> None:
    with pytest.raises(ValueError, match="'ffa_lora' is exact because .* with .*lora_magnitude_vector.* is rescaled"):
        check_adapter("ffa_lora", lora(use_dora=True, target_modules=["up"]))


def test_ffa_refuses_embeddings_whose_frozen_factor_is_zero() -> None:
    with pytest.raises(ValueError, match=r"'ffa_lora' trains with \S*embed.lora_embedding_A frozen, but it is zero"):
        check_adapter("ffa_lora", lora())


def test_ffa_refuses_a_second_product_behind_the_first() -> None:
    with pytest.raises(ValueError, match="belongs to a second product"):
        check_adapter("ffa_lora", scl(variant="bottleneck"))


@pytest.mark.parametrize(
    "build",
    [
        lambda: lora(target_modules=["up", "c_proj"]),
        scl,
        MODELS["scl without residual"],
        lambda: scl(activation="gelu"),
    ],
    ids=["lora", "scl", "scl without residual", "scl with activation"],
)
def test_ffa_takes_adapters_whose_frozen_factor_reads_something(build) -> None:
    assert check_adapter("ffa_lora", build()) == []


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.uses_pairs] + ["rolora"])
def test_rules_on_products_refuse_what_is_no_product(name: str) -> None:
    with pytest.raises(ValueError, match="c_proj has the activation 'gelu'"):
        check_adapter(name, scl(activation="gelu"))
    assert {pair.module for pair in check_adapter(name, lora())} == set(LORA_TARGETS)


@pytest.mark.parametrize("name", METHODS)
def test_only_rules_that_add_to_the_base_need_one(name: str) -> None:
    model = scl(keep_residual=False)
    if METHODS[name].adds_to_base:
        with pytest.raises(ValueError, match="replaces the base weight"):
            check_adapter(name, model)
    else:
        check_adapter(name, model)


@pytest.mark.parametrize("name", ["fedavg", "fedsa_lora", "median", "norm_bounding"])
def test_other_methods_take_any_adapter(name: str) -> None:
    for model in (lora(use_dora=True, target_modules=["up"]), scl(variant="bottleneck", activation="gelu")):
        assert check_adapter(name, model) == []


def test_base_in_bfloat16_is_rounded_once_and_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pairs, "BLOCK", 14)  # two rows of seven
    model = lora(target_modules=["square", "c_proj"]).to(torch.bfloat16)
    pairs = factor_pairs(model)
    change = {pair.module: (torch.randn(7, 3), torch.randn(3, 10 if pair.module == "c_proj" else 7)) for pair in pairs}
    layers = adapted_layers(model)
    expected = {}
    for pair in pairs:
        left, right = change[pair.module]
        product = (left @ right).T if pair.transposed else left @ right
        expected[pair.module] = (layers[pair.module].get_base_layer().weight.float() + product).to(torch.bfloat16)
    add_to_base(model, change, pairs)
    for name, weight in expected.items():
        assert torch.equal(layers[name].get_base_layer().weight, weight)


def test_one_live_model_trains_a_client_of_a_smaller_rank() -> None:
    """Zero rows of `A` and columns of `B` get no gradient, so they stay zero, also under weight decay and momentum."""
    model = lora(r=4, target_modules=["up", "c_proj"])
    adapter, pairs = LiveAdapter(model), factor_pairs(model)
    start = randomise(adapter, 1)
    adapter.write(truncate_ranks(start, pairs, 2, pad=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(11)).square().sum().backward()
        optimizer.step()
    trained = adapter.read()
    for pair in pairs:
        A, B = trained[pair.key_A], trained[pair.key_B]
        assert not A[2:].any() and not B[:, 2:].any()
        assert (A[:2] != start[pair.key_A][:2]).all() and (B[:, :2] != start[pair.key_B][:, :2]).all()


def pair_values(pair: FactorPair) -> tuple[str, str, str]:
    return pair.module, pair.key_A, pair.key_B


def test_pairs_of_a_named_adapter() -> None:
    model = lora(target_modules=["up"])
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["square"]))
    assert [pair_values(pair) for pair in factor_pairs(model, "other")] == [
        ("square", "base_model.model.square.lora_A.weight", "base_model.model.square.lora_B.weight")
    ]
