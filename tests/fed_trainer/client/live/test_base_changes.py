# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run adds to base weights, against dense float64 sums, and as a LoRA that stock PEFT loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.base_changes import BaseChanges
from fed_trainer.client.live.base_model import base_digest
from fed_trainer.client.live.pairs import add_to_base, factor_pairs
from fed_trainer.methods.aggregation import METHODS, ClientUpdate
from fed_trainer.state.adapter_state import AdapterState, subtract
from fed_trainer.state.factors import FactorPair
from fed_trainer.state.low_rank import LowRank
from helpers.models import logits
from peft_scl import FederaConfig, FederaLayer, LoraExport, SclConfig


pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to"),
]


class Net(nn.Module):
    """One layer of every kind, two of which have names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.c_proj = Conv1D(7, 10)
        self.block = nn.ModuleDict({"up": nn.Linear(7, 7), "other": nn.Linear(7, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["other"](self.block["up"](self.c_proj(self.up(self.embed(x)).relu())))


def net(config: PeftConfig, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net().to(dtype), config)


def lora_config(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["embed", "up", "c_proj"], **kwargs})


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora_config,
    "federa": lambda: FederaConfig(r=2, lora_alpha=3, target_modules=["embed", "up", "c_proj"]),
    "federa with the base kept": lambda: FederaConfig(r=2, target_modules=["embed", "up", "c_proj"], keep_base=True),
    "scl": lambda: SclConfig(r=2, target_modules=["c_proj"], scaling=0.5),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def weight_of(model: PeftModel, module: str) -> torch.Tensor:
    """The base weight as `(out, in)`, a copy."""
    layer = model.get_base_model().get_submodule(module).get_base_layer()
    weight = layer.weight.detach().clone()
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {pair.module: weight_of(model, pair.module) for pair in factor_pairs(model)}


def random_change(model: PeftModel, seed: int, columns: int = 3, size: float = 1.0) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for module, weight in weights_of(model).items():
        left, right = (len(weight), columns), (columns, weight.shape[1])
        changes[module] = LowRank(
            size * torch.randn(left, generator=generator), torch.randn(right, generator=generator)
        )
    return changes


def dense_sum(changes: Sequence[dict[str, LowRank]], module: str) -> torch.Tensor:
    return sum(change[module].left.double() @ change[module].right.double() for change in changes)


def begun(model: PeftModel) -> BaseChanges:
    return BaseChanges(model, factor_pairs(model))


def assert_same_bits(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key


# The live weights


@configs
def test_the_base_weight_is_the_first_one_plus_the_sum_over_rounds(config: Callable[[], PeftConfig]) -> None:
    model = net(config())
    before, changes = weights_of(model), begun(model)
    rounds = [random_change(model, seed) for seed in range(6)]  # 18 columns, more than any of the layers has
    for number, change in enumerate(rounds, start=1):
        changes.add(change)
        for module, weight in weights_of(model).items():
            expected = before[module].double() + dense_sum(rounds[:number], module)
            torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-5)


def test_modules_without_a_change_stay_as_they_are() -> None:
    model = net(lora_config())
    before, changes = weights_of(model), begun(model)
    changes.add({"up": random_change(model, 0)["up"]})
    after = weights_of(model)
    assert not torch.equal(after["up"], before["up"])
    assert torch.equal(after["embed"], before["embed"]) and torch.equal(after["c_proj"], before["c_proj"])
    assert set(changes.state_dict()) == {"up.left", "up.right"}


def test_small_changes_add_up_on_a_base_in_bfloat16() -> None:
    model, rounded_each_round = (net(lora_config(), torch.bfloat16) for _ in range(2))
    pairs = factor_pairs(model)
    before, changes = weights_of(model), begun(model)
    with torch.no_grad():
        for net_ in (model, rounded_each_round):  # entries of 1, the spacing above which is 2^-7
            net_.get_base_model().up.get_base_layer().weight.fill_(1.0)
    step = {"up": LowRank(torch.full((10, 1), 2.0**-10), torch.ones(1, 6))}
    for _ in range(64):
        changes.add(step)
        add_to_base(rounded_each_round, step, pairs)
    assert torch.equal(weight_of(rounded_each_round, "up"), torch.ones(10, 6, dtype=torch.bfloat16))
    assert torch.equal(weight_of(model, "up"), torch.full((10, 6), 1 + 2.0**-4, dtype=torch.bfloat16))
    assert torch.equal(weight_of(model, "embed"), before["embed"])


def test_autocast_does_not_round_what_is_added() -> None:
    model, in_autocast = net(lora_config()), net(lora_config())
    begun(model).add(random_change(model, 0))
    with torch.autocast("cpu", torch.bfloat16):
        begun(in_autocast).add(random_change(model, 0))
    assert_same_bits(weights_of(in_autocast), weights_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@configs
def test_reset_puts_the_first_weights_back_and_begins_anew(config: Callable[[], PeftConfig], dtype) -> None:
    model = net(config(), dtype)
    before, changes = weights_of(model), begun(model)
    changes.add(random_change(model, 0))
    first = weights_of(model)
    changes.add(random_change(model, 1))
    changes.reset()
    assert_same_bits(weights_of(model), before)
    assert changes.state_dict() == {}
    changes.add(random_change(model, 0))
    assert_same_bits(weights_of(model), first)


def test_the_first_weights_are_there_for_a_while() -> None:
    model = net(lora_config())
    before, digest, changes = weights_of(model), base_digest(model), begun(model)
    changes.add(random_change(model, 0))
    after = weights_of(model)
    assert base_digest(model) != digest
    with pytest.raises(KeyboardInterrupt), changes.taken_out():
        assert_same_bits(weights_of(model), before)
        assert base_digest(model) == digest
        raise KeyboardInterrupt
    assert_same_bits(weights_of(model), after)


# The sum, saved and put back


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds_before", [1, 4], ids=["few columns", "all columns"])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(
    config: Callable[[], PeftConfig], dtype: torch.dtype, rounds_before: int, tmp_path: Path
) -> None:
    model = net(config(), dtype)
    changes = begun(model)
    for seed in range(rounds_before):
        changes.add(random_change(model, seed))
    save_file(changes.state_dict(), tmp_path / "base_changes.safetensors")

    resumed = net(config(), dtype)
    others = begun(resumed)
    others.add(random_change(model, 100))  # of a run that is given up for the saved one
    others.load_state_dict(load_file(tmp_path / "base_changes.safetensors"))
    assert_same_bits(weights_of(resumed), weights_of(model))
    for seed in range(rounds_before, rounds_before + 3):
        changes.add(random_change(model, seed))
        others.add(random_change(model, seed))
        assert_same_bits(weights_of(resumed), weights_of(model))
    assert_same_bits(others.state_dict(), changes.state_dict())


def test_a_saved_sum_takes_the_place_of_the_present_one() -> None:
    model, other = net(lora_config()), net(lora_config())
    changes, others = begun(model), begun(other)
    changes.add(random_change(model, 0))
    others.add({"up": random_change(model, 1)["up"]})
    changes.load_state_dict(others.state_dict())
    assert_same_bits(weights_of(model), weights_of(other))
    assert_same_bits(changes.state_dict(), others.state_dict())


def test_the_saved_sum_is_float32_and_has_no_more_columns_than_the_weight() -> None:
    model = net(lora_config(), torch.bfloat16)
    changes = begun(model)
    for seed in range(5):
        changes.add(random_change(model, seed))
        state = changes.state_dict()
        for module, weight in weights_of(model).items():
            left, right = state[f"{module}.left"], state[f"{module}.right"]
            assert left.dtype == right.dtype == torch.float32
            assert left.shape == (len(weight), len(right)) and right.shape[1] == weight.shape[1]
            assert len(right) == min(3 * (seed + 1), *weight.shape)


def test_base_changes_of_another_model_are_refused_and_nothing_is_touched() -> None:
    model = net(lora_config())
    before, changes = weights_of(model), begun(model)
    fitting = LowRank(torch.ones(10, 1), torch.ones(1, 6))
    state = {f"up.{side}": factor for side, factor in fitting._asdict().items()}
    with pytest.raises(ValueError, match=r"that of up has the shape \(10, 5\) instead of \(10, 6\)"):
        changes.load_state_dict({**state, "up.right": torch.ones(1, 5)})
    with pytest.raises(ValueError, match=r"hold block.other, which has no factors of low rank in this model"):
        changes.load_state_dict({**state, "block.other.left": torch.ones(3, 1), "block.other.right": torch.ones(1, 7)})
    assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_moves_the_base_at_its_start_is_refused(start: str) -> None:
    model = net(lora_config(init_lora_weights=start, target_modules=["up"]))
    with pytest.raises(ValueError, match=f"`init_lora_weights='{start}'`, which moves the base weights"):
        begun(model)


# The published LoRA

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def llama(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **kwargs)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_inner": 40, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


ATTENTION = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 7}}
CONV = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "mlp.c_proj"], "task_type": "CAUSAL_LM"}
RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[], PeftConfig]]] = {
    "lora": (llama, lambda: LoraConfig(**ATTENTION)),
    "rslora": (llama, lambda: LoraConfig(**ATTENTION, use_rslora=True)),
    "rank and alpha patterns": (llama, lambda: LoraConfig(**ATTENTION, **PATTERNS)),
    "lora with biases": (llama, lambda: LoraConfig(**ATTENTION, bias="all", modules_to_save=["lm_head"])),
    "lora with tokens": (llama, lambda: LoraConfig(**ATTENTION, trainable_token_indices={"embed_tokens": [1, 5]})),
    "lora with a trained embedding tied to the head": (
        lambda: llama(tie_word_embeddings=True),
        lambda: LoraConfig(**ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "lora on embedding and head": (
        llama,
        lambda: LoraConfig(r=3, target_modules=["embed_tokens", "lm_head", "q_proj"], task_type="CAUSAL_LM"),
    ),
    "lora on Conv1D": (gpt2, lambda: LoraConfig(**CONV, fan_in_fan_out=True, bias="lora_only")),
    "federa": (llama, lambda: FederaConfig(**ATTENTION, **PATTERNS)),
    "federa with the base kept": (
        llama,
        lambda: FederaConfig(r=3, target_modules=["embed_tokens", "q_proj"], keep_base=True, task_type="CAUSAL_LM"),
    ),
    "federa on Conv1D": (gpt2, lambda: FederaConfig(**CONV)),
    "scl": (llama, lambda: SclConfig(r=3, scaling=0.5, modules_to_save=["lm_head"], task_type="CAUSAL_LM")),
    "scl on Conv1D": (gpt2, lambda: SclConfig(r=3, target_modules=["mlp.c_proj"], task_type="CAUSAL_LM")),
}
runs = pytest.mark.parametrize("base, config", RUNS.values(), ids=RUNS)
rules = pytest.mark.parametrize("rule", ["flora", "fedex_lora"])


def randomised(state: AdapterState, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}


def run_rounds(model: PeftModel, changes: BaseChanges, pairs: list[FactorPair], rule: str, num_rounds: int) -> None:
    """Rounds of two clients that end with random adapters."""
    adapter, aggregator = LiveAdapter(model), METHODS[rule].build(pairs)
    for round in range(1, num_rounds + 1):
        state = adapter.read()
        aggregator.begin(state, round)
        for index in range(2):
            local = randomised(state, 10 * round + index)
            aggregator.add(ClientUpdate(str(index), 1 + index, subtract(local, state)))
        delta = aggregator.finish()
        adapter.write({key: tensor + delta[key] for key, tensor in state.items()})
        changes.add(aggregator.base_change)
    adapter.write(randomised(adapter.read(), 1000))  # the adapter of FLoRA has just restarted, and changes nothing


def published(model: PeftModel, changes: BaseChanges, folder: Path) -> LoraExport:
    export = changes.to_lora(LiveAdapter(model).read(include_frozen=True))
    export.save_pretrained(folder)
    return export


@runs
@rules
@pytest.mark.parametrize("num_rounds", [1, 4])  # 4 rounds: more columns than the layers have
def test_stock_peft_computes_what_the_live_model_does(
    base, config, rule: str, num_rounds: int, tmp_path: Path
) -> None:
    model = get_peft_model(base(), config()).eval()
    pairs = factor_pairs(model)
    changes = BaseChanges(model, pairs)
    run_rounds(model, changes, pairs, rule, num_rounds)
    export = published(model, changes, tmp_path)
    assert export.error < 1e-6 and export.errors.keys() == {pair.module for pair in pairs}

    untouched = base()
    assert (logits(model) - logits(untouched)).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    loaded_config, live_config = loaded.peft_config["default"], model.peft_config["default"]
    assert type(loaded_config) is LoraConfig
    for name in ("bias", "ensure_weight_tying", "modules_to_save", "task_type", "trainable_token_indices"):
        if hasattr(live_config, name):
            assert getattr(loaded_config, name) == getattr(live_config, name)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)
    for pair in factor_pairs(loaded):
        assert pair.scaling == 1
        rows, columns = weight_of(loaded, pair.module).shape
        assert len(export.state_dict[pair.key_A]) <= min(rows, columns)


def test_ranks_that_differ_are_matched_by_the_whole_name(tmp_path: Path) -> None:
    """PEFT takes the key `up` of a pattern for `block.up` too."""
    model = net(LoraConfig(r=2, target_modules=["up", "c_proj"]))
    changes, x = begun(model), torch.arange(11)
    for seed, module in enumerate(["up", "up", "block.up"]):
        changes.add({module: random_change(model, seed, columns=1)[module]})
    export = published(model, changes, tmp_path)
    assert export.config.r == 4
    assert export.config.rank_pattern == export.config.alpha_pattern == {r"^block\.up": 3, "^c_proj": 2}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)


def test_without_a_change_the_export_is_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**ATTENTION)).eval()
    adapter = LiveAdapter(model)
    adapter.write(randomised(adapter.read(), 1))
    published(model, begun(model), tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].r == 3
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


RESUMED = ["lora on embedding and head", "federa", "federa with the base kept", "scl"]


def saved(model: PeftModel, changes: BaseChanges, folder: Path) -> None:
    with changes.taken_out():
        model.save_pretrained(folder)
    save_file(changes.state_dict(), folder / "base_changes.safetensors")


def load(model: PeftModel, changes: BaseChanges, folder: Path) -> None:
    changes.reset()
    LiveAdapter(model).load(load_file(folder / "adapter_model.safetensors"), "The saved adapter")
    changes.load_state_dict(load_file(folder / "base_changes.safetensors"))


@rules
@pytest.mark.parametrize("name", RESUMED)
def test_adapter_and_base_resume_bit_for_bit(name: str, rule: str, tmp_path: Path) -> None:
    """
    Also where PEFT saves base weights with the adapter, those of embedding and head: they must not be changed twice.
    """
    base, config = RUNS[name]
    model, resumed = (get_peft_model(base(), config()).eval() for _ in range(2))
    pairs, changes, others = factor_pairs(model), begun(model), begun(resumed)
    run_rounds(model, changes, pairs, rule, 2)
    saved(model, changes, tmp_path)
    others.add(random_change(resumed, 0))  # of a run that is given up for the saved one
    load(resumed, others, tmp_path)
    assert_same_bits(weights_of(resumed), weights_of(model))
    assert torch.equal(logits(resumed), logits(model))


def test_base_changes_stay_when_another_start_moves_a_residual_base(tmp_path: Path) -> None:
    """Singular vectors, and so the start of FeDeRA, need not be the same on the machine that resumes."""
    base, config = RUNS["federa"]
    model, resumed = (get_peft_model(base(), config()).eval() for _ in range(2))
    pairs, changes = factor_pairs(model), begun(model)
    run_rounds(model, changes, pairs, "fedex_lora", 2)
    saved(model, changes, tmp_path)
    for layer in resumed.modules():
        if isinstance(layer, FederaLayer):
            layer.load_start("default", 0.5 * layer.lora_start_A["default"], layer.lora_start_B["default"])
    others = begun(resumed)
    load(resumed, others, tmp_path)
    later = random_change(model, 0)
    for either in (changes, others):
        either.add(later)
    torch.testing.assert_close(logits(resumed), logits(model), rtol=0, atol=1e-5)


def test_a_base_in_bfloat16_is_published_for_the_base_in_float32(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The sum is in float32, so what a base in bfloat16 rounds away is published."""
    config = LoraConfig(**ATTENTION)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16), config)
    changes, wide = begun(model), AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    rounds = [random_change(model, seed, size=1e-4) for seed in range(3)]
    for change in rounds:
        changes.add(change)
    published(model, changes, tmp_path)
    before = {module: wide.get_submodule(module).weight.detach().double() for module in rounds[0]}
    merged = PeftModel.from_pretrained(wide, tmp_path).merge_and_unload()
    for module, weight in before.items():
        change = merged.get_submodule(module).weight.double() - weight
        torch.testing.assert_close(change, dense_sum(rounds, module), rtol=0, atol=1e-7)
