# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.base_model import base_digest
from fed_trainer.state.adapter_state import AdapterState, check_same_layout, state_bytes, subtract
from helpers.models import move
from peft_scl import FederaConfig, SclConfig
from peft_scl.linalg import evenly_spaced


TOKENS = torch.arange(4, 20).unsqueeze(0)

# made anew for every model: PEFT writes into the config it is given
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "lora_modules_to_save": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "scl": lambda: SclConfig(r=4),
    "lora_tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "scl_full": lambda: SclConfig(r=4, variant="bottleneck", train_down_proj="full"),
    "scl_principal_delta": lambda: SclConfig(r=4, variant="bottleneck", down_proj_start="principal"),
    "scl_replacing": lambda: SclConfig(r=4, keep_residual=False),
    "scl_modules_to_save": lambda: SclConfig(r=4, modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
all_configs = pytest.mark.parametrize("config", list(CONFIGS))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def make_model(folder: Path, config: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A new adapter on the tiny model, adapter and base in `dtype`."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return get_peft_model(base, CONFIGS[config](), autocast_adapter_dtype=False).eval()


def random_like(state: AdapterState, seed: int = 2) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(t.shape, generator=generator).to(t.dtype) for key, t in state.items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Comparable with `==`, unlike tensors, and exact: 0.0 and -0.0 differ, NaN equals NaN."""
    return {
        key: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for key, t in tensors.items()
    }


# Reading and writing


@all_configs
@dtypes
def test_read_is_what_peft_saves(tiny_model_dir: Path, tmp_path: Path, config: str, dtype: torch.dtype) -> None:
    model = make_model(tiny_model_dir, config, dtype)
    move(model, size=0.1)
    state = LiveAdapter(model).read(include_frozen=True)
    model.save_pretrained(tmp_path)
    assert bits(state) == bits(load_file(tmp_path / "adapter_model.safetensors"))
    assert list(state) == sorted(state)
    assert {(tensor.device.type, tensor.dtype) for tensor in state.values()} == {("cpu", dtype)}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())


def test_the_frozen_start_of_a_compression_does_not_travel(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "scl")
    live = LiveAdapter(model)
    travels, saved = live.read(), live.read(include_frozen=True)
    assert {key for key in saved if ".scl_start_" in key} == saved.keys() - travels.keys() != set()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in travels.values()) == trained
    # an adapter from elsewhere brings its start along
    state = random_like(saved)
    live.write(state)
    assert bits(live.read(include_frozen=True)) == bits(state)


@pytest.mark.parametrize("keep_base", [False, True])
@dtypes
def test_federa_travels_as_it_is_trained(
    tiny_model_dir: Path, tmp_path: Path, keep_base: bool, dtype: torch.dtype
) -> None:
    """PEFT saves the factors and their start as one LoRA; clients train, send and average the factors alone."""

    def make(targets: list[str]) -> PeftModel:
        base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
        config = FederaConfig(
            r=4, lora_alpha=8, target_modules=targets, modules_to_save=["lm_head"], keep_base=keep_base
        )
        return get_peft_model(base, config, autocast_adapter_dtype=False).eval()

    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = make(targets)
    live, at_start = LiveAdapter(model), make(targets)
    travels = live.read()
    stays = live.read(include_frozen=True).keys() - travels.keys()
    assert {key for key in stays if not key.endswith("embed_tokens.base_layer.weight")} == {
        key for key in live.read(include_frozen=True) if ".lora_start_" in key
    }
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in travels.values()) == trained
    move(model, size=0.1)
    state = live.read()
    assert bits(state) != bits(travels)

    other = LiveAdapter(at_start)
    other.write(state)
    assert torch.equal(at_start(TOKENS).logits, model(TOKENS).logits)
    live.write(travels)  # as a later round does
    model.save_pretrained(tmp_path / "start")
    live.write(state)
    model.save_pretrained(tmp_path / "trained")
    fresh = make(targets)
    restored = LiveAdapter(fresh)
    ids = restored.tensor_ids
    restored.load(load_file(tmp_path / "trained" / "adapter_model.safetensors"), "The checkpoint")
    assert bits(restored.read(include_frozen=True)) == bits(live.read(include_frozen=True))
    assert restored.tensor_ids == ids
    assert bits(fresh.state_dict()) == bits(model.state_dict())
    with pytest.raises(ValueError, match="The checkpoint does not fit: "):
        LiveAdapter(make(["q_proj"])).load(
            load_file(tmp_path / "start" / "adapter_model.safetensors"), "The checkpoint"
        )


def test_the_digest_of_a_residual_base_is_that_of_the_model(tiny_model_dir: Path) -> None:
    digests = set()
    for keep_base in (False, True):
        base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        digests.add(base_digest(get_peft_model(base, FederaConfig(target_modules=["q_proj"], keep_base=keep_base))))
    digests.add(base_digest(make_model(tiny_model_dir, "lora")))
    assert len(digests) == 1


@all_configs
def test_read_is_a_copy(tiny_model_dir: Path, config: str) -> None:
    model = make_model(tiny_model_dir, config)
    before = bits(model.state_dict())
    live = LiveAdapter(model)
    for tensor in live.read().values():
        tensor.fill_(7)
    assert bits(model.state_dict()) == before

    read = live.read()
    kept = bits(read)
    move(model, size=0.1)
    assert bits(read) == kept != bits(live.read())


@all_configs
@dtypes
def test_write_of_read_changes_no_bit(tiny_model_dir: Path, config: str, dtype: torch.dtype) -> None:
    model = make_model(tiny_model_dir, config, dtype)
    move(model, size=0.1)
    live = LiveAdapter(model)
    before = bits(model.state_dict())
    live.write(live.read())
    assert bits(model.state_dict()) == before

    state = random_like(live.read())
    kept = bits(state)
    live.write(state)
    assert bits(live.read()) == bits(state) == kept


@all_configs
def test_write_changes_the_adapter_only(tiny_model_dir: Path, config: str) -> None:
    model = make_model(tiny_model_dir, config)
    live = LiveAdapter(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before, objects = bits(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    live.write(random_like(live.read()))
    after = bits(model.state_dict())
    assert {name for name in after if after[name] != before[name]} == trainable
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert {objects[name] for name in trainable} <= live.tensor_ids
    assert live.tensor_ids.isdisjoint(objects[name] for name in objects.keys() - trainable)


@all_configs
@torch.no_grad()
def test_write_is_what_the_model_computes_with(tiny_model_dir: Path, tmp_path: Path, config: str) -> None:
    model = make_model(tiny_model_dir, config)
    live = LiveAdapter(model)
    at_start = model(TOKENS).logits
    start = live.read()
    move(model, size=0.1)
    state, expected = live.read(), model(TOKENS).logits

    live.write(start)
    assert torch.equal(model(TOKENS).logits, at_start)
    assert not torch.equal(at_start, expected)
    other = make_model(tiny_model_dir, config)
    LiveAdapter(other).write(state)
    assert torch.equal(other(TOKENS).logits, expected)

    other.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_dir), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, expected)


@all_configs
def test_optimiser_made_before_write_still_trains(tiny_model_dir: Path, config: str) -> None:
    model = make_model(tiny_model_dir, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    live = LiveAdapter(model)
    move(model, size=0.1)
    state = live.read()
    move(model, seed=3, size=0.1)
    live.write(state)

    model(TOKENS, labels=TOKENS).loss.backward()
    gradients = get_peft_model_state_dict(
        model, state_dict={name: parameter.grad for name, parameter in model.named_parameters()}
    )
    optimizer.step()
    trained = live.read()
    assert gradients.keys() == state.keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, state[key] - 0.5 * gradients[key])


def test_adapter_that_is_not_active_is_left_alone(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "scl")
    model.add_adapter("other", SclConfig(r=2))
    model.set_adapter("other")
    other = LiveAdapter(model).read()
    model.set_adapter("default")
    live = LiveAdapter(model)
    assert {key: tensor.shape for key, tensor in live.read().items()} != {key: t.shape for key, t in other.items()}
    live.write(random_like(live.read()))
    model.set_adapter("other")
    assert bits(LiveAdapter(model).read()) == bits(other)


def test_several_active_adapters_are_refused(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "lora")
    model.add_adapter("other", CONFIGS["lora"]())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"The adapters \['default', 'other'\] are active, but a federation trains one"
    ):
        LiveAdapter(model)


def test_partitioned_adapter_is_refused(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "lora")
    weight = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.lora_B.default").weight
    weight.data = torch.empty(0)  # as under ZeRO-3
    with (
        pytest.warns(UserWarning, match="invalid shape"),
        pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B\.weight is empty or not held by this process"
        ),
    ):
        LiveAdapter(model)


def test_meta_adapter_is_refused(tiny_model_dir: Path) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(tiny_model_dir))
    model = get_peft_model(base, CONFIGS["lora"](), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="is empty or not held by this process"):
        LiveAdapter(model)


# Differences, sizes, layouts


def test_subtract_is_exact_for_equal_states_and_keeps_the_dtype() -> None:
    start = {"a": torch.randn(3, 5, dtype=torch.bfloat16), "b": torch.randn(4)}
    local = {key: tensor + 1 for key, tensor in start.items()}
    delta = subtract(local, start)
    assert {key: tensor.dtype for key, tensor in delta.items()} == {"a": torch.bfloat16, "b": torch.float32}
    assert all(torch.equal(delta[key], local[key] - start[key]) for key in start)
    assert all(tensor.count_nonzero() == 0 for tensor in subtract(start, start).values())


def test_state_bytes() -> None:
    state = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int8)}
    assert state_bytes(state) == 3 * 5 * 4 + 7 * 2 + 1
    assert state_bytes({}) == 0


REFERENCE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": None},
            r"The update does not fit: 1 tensors are missing \(the first: \['a'\]\) and 0 are unexpected \(the first: \[\]\)",
        ),
        (
            {"d": torch.zeros(1), "c": torch.zeros(1)},
            r"The update does not fit: 0 tensors are missing \(the first: \[\]\) and 2 are unexpected \(the first: \['c'\]\)",
        ),
        ({"b": None, "c": torch.zeros(4)}, r"1 tensors are missing \(the first: \['b'\]\) and 1 are unexpected"),
        (
            {"a": torch.zeros(3, 2)},
            r"The update does not fit: a has the shape \(3, 2\) instead of \(2, 3\)\. It belongs",
        ),
        ({"b": torch.zeros(4, 1)}, r"b has the shape \(4, 1\) instead of \(4,\)"),
        ({"b": torch.tensor([0, 0, 0, float("nan")])}, "The update has values that are not finite in b. Lower"),
        ({"a": torch.full((2, 3), float("inf"))}, "The update has values that are not finite in a"),
        ({"a": torch.full((2, 3), float("-inf"), dtype=torch.bfloat16)}, "values that are not finite in a"),
    ],
)
def test_layout_that_does_not_fit(changes: dict[str, torch.Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in (REFERENCE | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        check_same_layout(state, REFERENCE, "The update")


def test_layout_that_fits() -> None:
    check_same_layout({"b": torch.ones(4, dtype=torch.bfloat16), "a": torch.randn(2, 3)}, REFERENCE, "The update")


# The digest of the base model


@pytest.fixture(scope="module")
def digest(tiny_model_dir: Path) -> str:
    digest = base_digest(make_model(tiny_model_dir, "lora"))
    assert digest is not None and len(digest) == 64
    return digest


@pytest.mark.parametrize("config", [name for name in CONFIGS if "modules_to_save" not in name])
@dtypes
def test_digest_is_that_of_the_base(tiny_model_dir: Path, digest: str, config: str, dtype: torch.dtype) -> None:
    model = make_model(tiny_model_dir, config, dtype)
    assert base_digest(model) == digest
    move(model, size=0.1)
    assert base_digest(model) == digest
    with model.disable_adapter():
        assert base_digest(model) == digest


def with_another(folder: Path, name: str, target: Path) -> Path:
    """The tiny model with another weight in the module `name`."""
    other = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(1.5)
    other.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("config", "name"), [("scl_modules_to_save", "lm_head"), ("lora_modules_to_save", "model.embed_tokens")]
)
def test_digest_is_that_of_the_base_without_modules_to_save(
    tiny_model_dir: Path, tmp_path: Path, digest: str, config: str, name: str
) -> None:
    model = make_model(tiny_model_dir, config)
    without = base_digest(model)
    assert without != digest
    move(model, size=0.1)
    assert base_digest(model) == without
    assert base_digest(make_model(with_another(tiny_model_dir, name, tmp_path), config)) == without


def test_a_weight_that_is_tied_to_one_in_modules_to_save_counts(tiny_model_dir: Path) -> None:
    digests = set()
    for factor in (1.0, 1.5):
        base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        base.lm_head.weight = base.model.embed_tokens.weight
        with torch.no_grad():
            base.lm_head.weight.mul_(factor)
        digests.add(base_digest(get_peft_model(base, SclConfig(r=4, modules_to_save=["lm_head"]))))
    assert len(digests) == 2  # the embedding goes on using it


def test_digest_with_a_second_adapter(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "scl")
    model.add_adapter("other", SclConfig(r=2, modules_to_save=["lm_head"]))
    model.set_adapter("other")
    move(model, size=0.1)
    assert base_digest(model) == base_digest(make_model(tiny_model_dir, "scl_modules_to_save"))


def test_digest_with_a_prompt(tiny_model_dir: Path, digest: str) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    assert base_digest(get_peft_model(base, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))) == digest


@pytest.mark.parametrize("config", ["lora", "scl_modules_to_save", "lora_tokens"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",  # wrapped by one
        "model.layers.0.mlp.down_proj",  # wrapped by two
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.post_attention_layernorm",
    ],
)
def test_digest_of_another_base(tiny_model_dir: Path, tmp_path: Path, config: str, name: str) -> None:
    same = base_digest(make_model(tiny_model_dir, config))
    assert base_digest(make_model(with_another(tiny_model_dir, name, tmp_path), config)) != same


def test_digest_of_other_shapes_with_the_same_values(tiny_model_dir: Path, digest: str) -> None:
    model = make_model(tiny_model_dir, "lora")
    weight = model.get_base_model().lm_head.weight
    weight.data = weight.data.reshape(weight.shape[0] // 2, -1)
    assert base_digest(model) != digest


def test_the_sample_of_a_large_tensor_ends_with_its_last_entry() -> None:
    size = 2**25 + 3  # not a float32
    sample = evenly_spaced(torch.arange(size, dtype=torch.int32))
    assert len(sample) == 64
    assert sample[0] == 0 and sample[-1] == size - 1
    assert (sample.diff() - size / 63).abs().max() <= 1


def test_quantised_base_has_no_digest(tiny_model_dir: Path) -> None:
    model = make_model(tiny_model_dir, "lora")
    model.get_base_model().is_quantized = True
    assert base_digest(model) is None


def test_factors_that_two_layers_share_are_refused() -> None:
    """Seen from the other layer they are transposed, and would be saved so."""
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    settings = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(
        ValueError, match="two layers share it .*`ensure_weight_tying=True`.* Set `ensure_weight_tying=False`"
    ):
        LiveAdapter(get_peft_model(LlamaForCausalLM(config), settings))
