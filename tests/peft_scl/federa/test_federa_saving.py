# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is saved, who can load it, and that training goes on from it as if it had never stopped."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from helpers.federa_reference import MODELS, adapted, both_modes, build, config_for, factors, federa_layers, scaling_of
from helpers.models import TOKENS, logits, move
from peft_scl import FederaConfig, federa_state_dict, load_federa


modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)
all_models = pytest.mark.parametrize("name", MODELS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

_STOCK = """
import sys
import torch
from peft import PeftModel, LoraConfig
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert type(model.peft_config["default"]) is LoraConfig
assert not any(name.split(".")[0] == "peft_scl" for name in sys.modules)
torch.save(model(input_ids=torch.arange(1, 13).view(2, 6)).logits.detach(), sys.argv[3])
"""


def test_a_process_without_this_package_loads_it(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    expected = {}
    for mode, keep_base in both_modes.items():
        model = move(adapted("llama", keep_base=keep_base))
        model.save_pretrained(tmp_path / mode)
        expected[mode] = logits(model)
    # the same change of the same model
    torch.testing.assert_close(expected["residual"], expected["keep_base"], rtol=1e-4, atol=1e-6)
    output = tmp_path / "logits"
    subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            _STOCK,
            str(tmp_path / "base"),
            str(tmp_path / "residual"),
            str(output),
        ],
        check=True,
    )
    torch.testing.assert_close(torch.load(output), expected["residual"], rtol=1e-4, atol=1e-6)


@modes
@all_models
@pytest.mark.parametrize("rslora", [False, True])
def test_stock_peft_gives_the_same_outputs(name, keep_base, rslora, tmp_path):
    first, second = MODELS[name][3]
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {second: 3}}
    model = move(adapted(name, keep_base=keep_base, use_rslora=rslora, **patterns))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)
        restored = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert type(restored.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(restored), logits(model), rtol=1e-4, atol=1e-6)
    native = build(name)
    native.load_adapter(str(tmp_path))
    if name != "bert":  # transformers loads no classification head with an adapter
        torch.testing.assert_close(logits(native), logits(model), rtol=1e-4, atol=1e-6)


@modes
@pytest.mark.parametrize("rslora", [False, True])
def test_the_file_is_factors_and_start_of_twice_the_rank(keep_base, rslora, tmp_path):
    model = move(adapted("llama", keep_base=keep_base, use_rslora=rslora, rank_pattern={"down_proj": 3}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config.keys() == LoraConfig().to_dict().keys()
    assert config["r"] == 8
    assert config["rank_pattern"] == {"down_proj": 6}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(federa_layers(model))
    for name, layer in federa_layers(model).items():
        found = factors(layer)
        lora_A = saved[f"base_model.model.{name}.lora_A.weight"].double()
        lora_B = saved[f"base_model.model.{name}.lora_B.weight"].double()
        assert torch.equal(lora_A, torch.cat([found["A"], found["A0"]]))
        assert torch.equal(lora_B, torch.cat([found["B"], -found["B0"]], dim=1))
        saved_scaling = scaling_of(lora_A.shape[0], config["lora_alpha"], rslora)
        assert saved_scaling == pytest.approx(scaling_of(layer.r["default"], 8, rslora), rel=1e-12)


def _steps(model, optimizer, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        tokens = torch.randint(1, 64, (2, 6))
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _optimizer(model):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)


@modes
@dtypes
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_embedding", "gpt2"])
def test_training_goes_on_bit_for_bit(name, keep_base, dtype, low_cpu_mem_usage, tmp_path):
    if low_cpu_mem_usage and dtype != torch.float32:
        pytest.skip("PEFT casts float32 factors to the dtype of the base when it loads them with `low_cpu_mem_usage`")
    whole = adapted(name, dtype, keep_base=keep_base)
    optimizer = _optimizer(whole)
    _steps(whole, optimizer, 0, 3)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again = load_federa(build(name, dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    saved, loaded = whole.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for key in saved:
        assert torch.equal(saved[key], loaded[key]), key
        assert saved[key].dtype == loaded[key].dtype
    again_optimizer = _optimizer(again)
    again_optimizer.load_state_dict(state)
    _steps(again, again_optimizer, 3, 6)
    _steps(whole, optimizer, 3, 6)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key
    assert torch.equal(logits(again.eval()), logits(whole.eval()))


def test_loading_computes_no_singular_vectors(tmp_path, monkeypatch):
    adapted("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("peft_scl.federa.layer.principal_factors", lambda *_: pytest.fail("computed a start"))
    model = load_federa(build("llama"), tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.peft_config["default"].init_lora_weights is True


@modes
def test_loading_into_the_live_model_goes_back_to_what_was_saved(keep_base, tmp_path):
    """As the Trainer does at the end of training, and when it resumes."""
    model = move(adapted("llama", keep_base=keep_base))
    model.save_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = {key: id(parameter) for key, parameter in model.named_parameters()}
    move(model, seed=7)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert objects == {key: id(parameter) for key, parameter in model.named_parameters()}


@modes
def test_another_start_moves_the_base_along(keep_base, tmp_path):
    """
    A file from a machine with other singular vectors: the model computes what was saved, up to one more rounding.
    """
    model = move(adapted("llama", keep_base=keep_base))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    for key in saved:  # the same change from a start that is turned and stretched
        rows = saved[key] if ".lora_A." in key else saved[key].T
        rows[4:] = (torch.tensor([[0.0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ rows[4:]).clone()
        rows[:4] += 0.01
        saved[key] = rows.contiguous() if ".lora_A." in key else rows.T.contiguous()
    save_file(saved, path, metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval())
    assert not torch.allclose(expected, logits(model), rtol=1e-2)
    model.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(build("llama")), rtol=1e-4, atol=1e-6)


@modes
def test_a_config_that_is_given_loads_it_as_federa(keep_base, tmp_path):
    model = move(adapted("llama", keep_base=keep_base))
    model.save_pretrained(tmp_path)
    config = FederaConfig.from_pretrained(tmp_path)
    assert config.to_dict() == {**model.peft_config["default"].to_dict(), "inference_mode": True}
    restored = PeftModel.from_pretrained(build("llama"), tmp_path, config=config).eval()
    assert torch.equal(logits(restored), logits(model))
    assert len(federa_layers(restored)) == len(federa_layers(model))


def test_adapters_of_other_names_are_saved_apart_and_loaded_beside_each_other(tmp_path):
    model = adapted("llama", keep_base=True)
    model.add_adapter("x", config_for("llama", keep_base=True, r=2))
    for name in ("default", "x"):
        model.set_adapter(name)
        move(model)
    model.save_pretrained(tmp_path)
    restored = load_federa(build("llama"), tmp_path)
    restored = load_federa(restored, tmp_path / "x", "x")
    for name in ("default", "x"):
        model.set_adapter(name)
        restored.set_adapter(name)
        assert torch.equal(logits(restored.eval()), logits(model))


def test_biases_modules_and_tokens_that_are_trained_come_along(tmp_path):
    model = get_peft_model(build("gpt2"), config_for("gpt2", bias="lora_only", trainable_token_indices=[3, 5])).eval()
    move(model)
    model.save_pretrained(tmp_path / "gpt2")
    for restored in (
        PeftModel.from_pretrained(build("gpt2"), tmp_path / "gpt2"),
        load_federa(build("gpt2"), tmp_path / "gpt2"),
    ):
        torch.testing.assert_close(logits(restored.eval()), logits(model), rtol=1e-4, atol=1e-6)
    model = move(adapted("llama", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "llama")
    restored = PeftModel.from_pretrained(build("llama"), tmp_path / "llama").eval()
    torch.testing.assert_close(logits(restored), logits(model), rtol=1e-4, atol=1e-6)


@modes
def test_a_residual_is_never_saved(keep_base, tmp_path):
    """
    PEFT saves the weight of a targeted embedding with the adapter, for the base model that it will be loaded onto.
    """
    model = move(adapted("llama_embedding", keep_base=keep_base))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert (key in saved) == keep_base
    if keep_base:
        assert torch.equal(saved[key], build("llama").model.embed_tokens.weight)
    assert saved["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (8, 64)
    assert saved["base_model.model.model.embed_tokens.lora_embedding_B"].shape == (16, 8)


@modes
def test_a_given_state_dict_is_saved_and_left_alone(keep_base):
    """ZeRO-3 and FSDP gather it elsewhere."""
    model = move(adapted("llama_embedding", keep_base=keep_base))
    state_dict = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    keys = set(state_dict)
    saved = get_peft_model_state_dict(model, state_dict=state_dict)
    assert set(state_dict) == keys
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    found = factors(federa_layers(model)["model.layers.0.self_attn.v_proj"])
    torch.testing.assert_close(saved[f"{name}.lora_B.weight"][:, 4:].double(), -(found["B0"] + 1))
    state_dict[f"{name}.lora_B.default.weight"] = torch.empty(0)
    with pytest.raises(ValueError, match="1 tensors of the FeDeRA adapter 'default' are empty"):
        get_peft_model_state_dict(model, state_dict=state_dict)


@modes
def test_the_live_tensors_are_those_of_the_model(keep_base):
    model = adapted("llama_embedding", keep_base=keep_base, modules_to_save=["lm_head"])
    live = federa_state_dict(model)
    for tensor in live.values():
        tensor.data.fill_(7)
    layers = federa_layers(model)
    assert all((tensor == 7).all() for layer in layers.values() for tensor in factors(layer).values())
    assert (model.get_base_model().lm_head.modules_to_save["default"].weight == 7).all()
    assert sum(".lora_start_" in key for key in live) == 2 * len(layers)


def test_transformers_own_methods_save_the_same(tmp_path):
    model = build("llama")
    expected = logits(model)
    model.add_adapter(config_for("llama"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)
    move(model)
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(restored), logits(model), rtol=1e-4, atol=1e-6)
    assert torch.equal(logits(load_federa(build("llama"), tmp_path).eval()), logits(model))
    model.disable_adapters()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)
    model.enable_adapters()
    with pytest.raises(ValueError, match="has `keep_base=False`: the base model holds its residual"):
        model.add_adapter(config_for("llama"), adapter_name="second")
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)


def _trainer(folder, model, **arguments):
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(1, 64, (16, 6), generator=torch.Generator().manual_seed(0))
    ]
    arguments = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, report_to="none",
        disable_tqdm=True, max_steps=4, bf16=False, **arguments,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
    )


@modes
def test_the_trainer_resumes_bit_for_bit(keep_base, tmp_path):
    whole = _trainer(tmp_path / "whole", adapted("llama", keep_base=keep_base))
    whole.train()
    again = _trainer(tmp_path / "again", adapted("llama", keep_base=keep_base))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = again.model.state_dict()
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    restored = PeftModel.from_pretrained(build("llama"), tmp_path / "whole" / "checkpoint-4").eval()
    torch.testing.assert_close(logits(restored), logits(whole.model.eval()), rtol=1e-4, atol=1e-6)


def test_the_model_card_says_what_it_is(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Trained with FeDeRA") == 1
    assert "arxiv.org/abs/2404.18848" in card
    assert "- federa\n" in card
    assert "import peft_scl" not in card


@pytest.mark.parametrize("change", ["rank", "model", "odd", "missing"])
def test_a_checkpoint_that_does_not_fit_is_refused(change, tmp_path):
    adapted("llama", **({"r": 2} if change == "rank" else {})).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    message = {
        "rank": "does not fit the FeDeRA adapter 'default': .* has the shape",
        "model": "does not fit the FeDeRA adapter 'default': .* has the shape",
        "odd": "has the rank 7, but a FeDeRA adapter is saved with twice its rank",
        "missing": "The checkpoint has no .*down_proj.lora_A.default.weight, which the FeDeRA adapter 'default' needs",
    }[change]
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    if change == "odd":
        saved[key] = saved[key][:7].contiguous()
    elif change == "model":
        saved[key] = saved[key][:, :5].contiguous()
    elif change == "missing":
        del saved[key]
    save_file(saved, path, metadata={"format": "pt"})
    model = adapted("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_folder_without_a_federa_config_is_refused(tmp_path):
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="There is no federa_config.json in .*, so it is not an adapter that FeDeRA has saved"
    ):
        load_federa(build("llama"), tmp_path)
    with pytest.raises(ValueError, match="There is no federa_config.json"):
        FederaConfig.from_pretrained("someone/not-here")


def test_fields_of_a_later_version_are_reported_and_ignored(tmp_path):
    FederaConfig(r=3, keep_base=True).save_pretrained(tmp_path)
    path = tmp_path / "federa_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\] for class FederaConfig"):
        config = FederaConfig.from_pretrained(tmp_path)
    assert (type(config), config.r, config.keep_base) == (FederaConfig, 3, True)


def test_the_saved_config_says_lora_to_everyone(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    build("llama").save_pretrained(tmp_path / "base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(tmp_path / "base")
    Path(tmp_path, "adapter_config.json").write_text(json.dumps(values))
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model(input_ids=TOKENS).logits.shape == (2, 6, 64)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path).peft_config["default"], LoraConfig)


def test_the_initial_model_is_not_needed_for_a_conversion(tmp_path):
    with pytest.raises(ValueError, match="`path_initial_model_for_weight_conversion` is not needed"):
        adapted("llama").save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "x")
        )
