# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The life of an adapter in PEFT: switching, deleting, saving, loading, pickling."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from helpers.models import TOKENS, logits
from helpers.scl_models import ARCHITECTURES, FFN, HIDDEN, LAYERS
from helpers.scl_reference import CONFIGS, Block, D, config_id, scl_layers, wrapped_block
from peft_scl import SclConfig


CONFIGS = [*CONFIGS, {"r": 4, "variant": "compress", "activation": "gelu", "scl_bias": True, "scaling": 0.5}]


def _llama(**config):
    torch.manual_seed(1)
    return get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(init_weights=False, **config)).eval()


def test_switching_adapters_and_disabling_them():
    model = wrapped_block({"r": 4}, {"r": 2, "variant": "compress", "keep_residual": False})
    x = torch.randn(3, D, dtype=torch.float64)
    outputs = {"both": model(x)}
    for name in ("x", "y"):
        model.set_adapter(name)
        outputs[name] = model(x)
        trainable = {key.split(".")[-2] for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name}
    with model.disable_adapter():
        outputs["base"] = model(x)
    torch.testing.assert_close(outputs["base"], model.unload()(x), rtol=0, atol=0)
    for one, other in (("both", "x"), ("both", "y"), ("x", "y"), ("x", "base"), ("y", "base")):
        assert not torch.allclose(outputs[one], outputs[other])


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "config",
    [
        {"r": D, "keep_residual": False, "activation": "gelu"},
        {"r": D, "keep_residual": False, "activation": "gelu", "scl_bias": True},
        {"r": 4, "keep_residual": False, "activation": "linear"},
        {"r": 4, "keep_residual": False, "activation": "linear", "scl_bias": True},
    ],
    ids=config_id,
)
def test_adapters_that_do_not_start_at_the_base_model_can_be_disabled(config, base):
    # what PEFT's test_disable_adapters and test_disable_adapters_with_merging check beyond a start at the base model
    torch.manual_seed(0)
    block = Block(base)
    x = torch.randn(9, D, dtype=torch.float64)
    expected = block(x)
    model = get_peft_model(block, SclConfig(target_modules=["down"], **config))

    def assert_disabling_is_undone(enabled):
        with model.disable_adapter():
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(x), enabled, rtol=0, atol=0)

    fresh = model(x)
    assert not torch.allclose(fresh, expected, rtol=1e-3, atol=1e-3)
    assert_disabling_is_undone(fresh)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model(x)
    assert not torch.allclose(trained, fresh, rtol=1e-3, atol=1e-3)
    assert_disabling_is_undone(trained)

    if config["activation"] == "linear":
        model.merge_adapter()
        torch.testing.assert_close(model(x), trained)
        assert_disabling_is_undone(trained)


def test_deleting_an_adapter():
    model = wrapped_block({"r": 4, "scl_dropout": 0.1}, {"r": 2, "variant": "bottleneck", "train_down_proj": "full"})
    (layer,) = scl_layers(model)
    x = torch.randn(3, D, dtype=torch.float64)
    model.set_adapter("y")
    expected = model(x)
    model.delete_adapter("x")
    for name in layer.adapter_layer_names + layer.other_param_names:
        assert "x" not in getattr(layer, name)
    assert not any(".x." in key for key in model.state_dict())
    assert torch.equal(model(x), expected)

    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("y")
    model.unmerge_adapter()
    model.delete_adapter("y")
    assert torch.equal(model.base_model(x), model.unload()(x))


def test_modules_to_save(tmp_path):
    model = get_peft_model(ARCHITECTURES["bert"].build(), SclConfig(r=4, modules_to_save=["classifier"]))
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trainable if ".scl_" not in key} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    expected = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(ARCHITECTURES["bert"].build(), tmp_path).eval()
    assert torch.equal(restored(TOKENS).logits, expected)


def test_modules_to_save_of_several_adapters(tmp_path):
    model = get_peft_model(
        ARCHITECTURES["bert"].build(), SclConfig(r=4, init_weights=False, modules_to_save=["classifier"]), "x"
    ).eval()
    model.add_adapter("y", SclConfig(r=4, variant="compress", init_weights=False, modules_to_save=["classifier"]))
    model.add_adapter("z", SclConfig(r=2, init_weights=False))
    heads = model.base_model.model.classifier.modules_to_save
    assert heads.keys() == {"x", "y"}
    outputs = {}
    for name in "xyz":
        model.set_adapter(name)
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(f".{name}." in key for key in trainable)
        assert any("classifier" in key for key in trainable) == (name in heads)
        with torch.no_grad():
            for key in trainable:
                model.get_parameter(key).add_(0.1)
        outputs[name] = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    for name in "xyz":
        model.set_adapter(name)
        assert torch.equal(model(TOKENS).logits, outputs[name])
        restored = PeftModel.from_pretrained(ARCHITECTURES["bert"].build(), tmp_path / name).eval()
        assert torch.equal(restored(TOKENS).logits, outputs[name])
    model.delete_adapter("x")
    assert heads.keys() == {"y"}


def test_a_layer_without_the_active_adapter_is_the_base_layer():
    model = get_peft_model(
        ARCHITECTURES["llama"].build(), SclConfig(r=4, layers_to_transform=0, init_weights=False), adapter_name="x"
    )
    model.add_adapter("y", SclConfig(r=4, layers_to_transform=1, init_weights=False))
    first, second = scl_layers(model)
    assert (set(first.scl_A), set(second.scl_A)) == ({"x"}, {"y"})
    h = torch.randn(3, FFN)
    assert torch.equal(second(h), second.get_base_layer()(h))
    assert not torch.allclose(first(h), first.get_base_layer()(h))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_saving_and_loading(config, low_cpu_mem_usage, tmp_path):
    model = _llama(**config)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(
        ARCHITECTURES["llama"].build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(restored), expected)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in restored.parameters())

    # next to an adapter that is there already, and to be trained further
    other = _llama(r=2)
    other.load_adapter(tmp_path, adapter_name="other", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    other.set_adapter("other")
    assert torch.equal(logits(other), expected)


def test_the_saved_file_holds_the_adapter_and_nothing_else(tmp_path):
    model = _llama(r=4, variant="bottleneck")
    model.merge_adapter()  # must not add to the file what unmerging needs
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {"scl_A": (4, FFN), "scl_B": (FFN, 4), "scl_delta_A": (4, FFN), "scl_delta_B": (HIDDEN, 4)}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["target_modules"], saved["exclude_modules"]) == (["mlp.down_proj"], None)


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_and_then_gives_the_same_logits(tmp_path):
    base = ARCHITECTURES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    expected = {}
    for index, config in enumerate(CONFIGS):
        torch.manual_seed(index)
        model = get_peft_model(
            ARCHITECTURES["llama"].build(), SclConfig(init_weights=False, task_type="CAUSAL_LM", **config)
        ).eval()
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / str(index))
        expected[index] = logits(model)
    torch.save({"tokens": TOKENS, "expected": expected}, tmp_path / "expected.pt")
    script = f"""
        import sys, torch
        from peft import AutoPeftModelForCausalLM, PeftModel
        from transformers import AutoModelForCausalLM

        folder = {str(tmp_path)!r}
        load_base = lambda: AutoModelForCausalLM.from_pretrained(folder + "/base")
        loaders = [
            lambda path: AutoPeftModelForCausalLM.from_pretrained(path),
            lambda path: PeftModel.from_pretrained(load_base(), path),
        ]
        assert "peft_scl" not in sys.modules
        for load in loaders:
            try:
                load(folder + "/0")
            except KeyError as error:
                assert error.args == ("SCL",), error
            else:
                raise AssertionError("loaded without the import")

        import peft_scl

        saved = torch.load(folder + "/expected.pt")
        with torch.no_grad():
            for index, logits in saved["expected"].items():
                for load in loaders:
                    assert torch.equal(load(f"{{folder}}/{{index}}").eval()(saved["tokens"]).logits, logits), index
        print("identical")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "identical"


def test_auto_class_in_this_process(tmp_path):
    model = _llama(r=4, task_type="CAUSAL_LM")
    model.get_base_model().save_pretrained(tmp_path / "base")
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    restored = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(restored), logits(model))


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_pickling_a_model(config):
    model = _llama(**config)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@torch.no_grad()
def _send_logits(models, tokens, queue):
    queue.put([model(tokens).logits.numpy() for model in models])


@pytest.mark.slow
def test_a_spawned_process_computes_the_same():
    models = [_llama(**config) for config in CONFIGS]
    context = multiprocessing.get_context("spawn")  # inherits nothing: the pickled config imports `peft_scl`
    queue = context.Queue()
    process = context.Process(target=_send_logits, args=(models, TOKENS, queue))
    process.start()
    outputs = queue.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    for model, output in zip(models, outputs, strict=True):
        assert torch.equal(torch.from_numpy(output), logits(model))


def test_a_state_dict_from_elsewhere_can_be_saved_and_empty_tensors_cannot(tmp_path):
    model = _llama(r=4)
    state = get_peft_model_state_dict(model)
    gathered = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], tensor + 1) for key, tensor in state.items())

    # what a parameter looks like under DeepSpeed ZeRO-3 outside of its forward
    for parameter in scl_layers(model)[0].scl_A.parameters():
        parameter.data = torch.empty(0)
    message = r"1 tensors of the SCL adapter 'default' are empty \(the first: .*layers\.0\.mlp\.down_proj\.scl_A"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


def test_a_checkpoint_without_the_start_needs_a_model_that_has_computed_it(tmp_path):
    model = _llama(r=4)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    changes = {key: t for key, t in get_peft_model_state_dict(model).items() if ".scl_start_" not in key}
    save_file(changes, tmp_path / "adapter_model.safetensors")

    restored = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path).eval()
    assert torch.equal(logits(restored), expected)
    set_peft_model_state_dict(restored, changes)
    assert torch.equal(logits(restored), expected)
    with pytest.raises(ValueError, match="lacks the tensors `scl_start_A` and `scl_start_B`"):
        PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path, low_cpu_mem_usage=True)


def test_an_empty_base_weight_cannot_start_a_compression():
    block = Block()
    block.down.weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="The weight of the down projection is empty, as under DeepSpeed ZeRO-3"):
        get_peft_model(block, SclConfig(r=4, variant="compress", target_modules=["down"]))
    get_peft_model(block, SclConfig(r=4, variant="bottleneck", target_modules=["down"]))  # does not read it


def test_training_changes_the_adapter_only_and_lowers_the_loss():
    for config in CONFIGS:
        torch.manual_seed(0)
        model = get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(**config))
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = model(TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for key, tensor in model.state_dict().items():
            frozen = ".scl_" not in key or ".scl_start_" in key
            assert torch.equal(tensor, before[key]) == frozen, key
