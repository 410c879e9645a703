# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Export as LoRA: equal to the dense formula, loadable without peft_scl, optimal when truncated, refused where it is
wrong.
"""

import json
import subprocess
import sys
import textwrap

import huggingface_hub
import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from helpers.scl_models import ARCHITECTURES, FFN, HIDDEN, LAYERS
from helpers.scl_reference import (
    BASES,
    Block,
    D,
    M,
    config_id,
    dense_base,
    dense_maps,
    reference_forward,
    scl_layers,
    wrapped_block,
)
from peft_scl import SclConfig, to_lora
from peft_scl.convert import main


TOKENS = torch.arange(1, 9)[None]
LOW_RANK = [
    {"r": 3, "variant": "bottleneck", "train_down_proj": "none"},
    {"r": 3, "variant": "bottleneck", "train_down_proj": "none", "scaling": 0.3},
    {"r": 3, "variant": "bottleneck", "scaling": 2.5},
    {"r": 2, "variant": "bottleneck", "down_proj_r": 4},
    {"r": 2, "variant": "compress", "scaling": 0.3},
    {"r": 6, "variant": "bottleneck", "down_proj_r": 5},  # more than D, the rank of any change
    {"r": 6, "variant": "compress"},
]
FULL_RANK = [
    {"r": 3, "variant": "bottleneck", "train_down_proj": "full", "scaling": 0.3},
    {"r": 3, "variant": "compress", "keep_residual": False},
    {"r": 3, "variant": "compress", "keep_residual": False, "scaling": 2.5},
]


def _dense_change(layer, config, name="x"):
    """`W' - W` and `b' - b` in float64, from the definition."""
    weight, _ = dense_base(layer)
    maps, s = dense_maps(layer, name), config.get("scaling", 1.0)
    series = s * maps["B"] @ maps["A"]
    offset = s * (maps["B"] @ maps["a"] + maps["b"])
    if config.get("variant", "compress") == "compress":
        return series - (s * maps["B0"] @ maps["A0"] if "A0" in maps else weight), offset
    weight_after = weight + maps.get("delta", torch.zeros_like(weight))
    return weight_after @ (torch.eye(M) + series) - weight, weight_after @ offset


def _exported_change(export, name="down"):
    key = f"base_model.model.{name}.lora_"
    return export.state_dict[key + "B.weight"].double() @ export.state_dict[key + "A.weight"].double()


def _model(architecture, **config):
    torch.manual_seed(1)
    model = get_peft_model(ARCHITECTURES[architecture].build(), SclConfig(init_weights=False, **config))
    return model.eval()


def _with_lora(export, base):
    model = get_peft_model(base, export.config)
    result = set_peft_model_state_dict(model, export.state_dict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


@pytest.mark.parametrize(
    ("base", "scl_bias"), [*((base, False) for base in BASES), ("linear", True), ("conv1d", True)]
)
@pytest.mark.parametrize("config", LOW_RANK, ids=config_id)
def test_the_lora_is_the_change_of_the_dense_formula(config, base, scl_bias):
    model = wrapped_block({**config, "scl_bias": scl_bias}, base=base)
    (layer,) = scl_layers(model)
    change, shift = _dense_change(layer, config)
    export = to_lora(model, "x", dtype=torch.float64)
    rank = config["r"] + (0 if "train_down_proj" in config else config.get("down_proj_r", config["r"]))  # or start
    assert (export.config.r, export.config.lora_alpha) == (rank, rank)
    torch.testing.assert_close(_exported_change(export), change, rtol=0, atol=1e-13)
    assert export.error < 1e-14

    h = torch.randn(5, M, dtype=torch.float64)
    expected = reference_forward(layer, {"x": config}, h)
    plain = Block(base)
    plain.load_state_dict(model.unload().state_dict())
    lora = _with_lora(export, plain)
    torch.testing.assert_close(lora.base_model.model.down(h), expected, rtol=0, atol=1e-12)
    assert ("base_model.model.down.lora_B.bias" in export.state_dict) == scl_bias
    if scl_bias:
        torch.testing.assert_close(export.state_dict["base_model.model.down.lora_B.bias"], shift, rtol=0, atol=1e-13)


@pytest.mark.parametrize("r", [1, 4, 6])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("config", [*LOW_RANK[2:4], *LOW_RANK[5:], *FULL_RANK], ids=config_id)
def test_a_named_rank_gives_the_best_approximation_and_its_error(config, base, r):
    model = wrapped_block(config, base=base)
    (layer,) = scl_layers(model)
    change, _ = _dense_change(layer, config)
    values = torch.linalg.svdvals(change)
    optimal = (values[r:].norm() / values.norm()).item()

    export = to_lora(model, "x", r=r, dtype=torch.float64)
    assert export.state_dict["base_model.model.down.lora_A.weight"].shape == (r, M)
    assert export.state_dict["base_model.model.down.lora_B.weight"].shape == (D, r)
    distance = ((_exported_change(export) - change).norm() / change.norm()).item()
    assert export.error == pytest.approx(distance, rel=1e-9, abs=1e-13)
    assert export.error == pytest.approx(optimal, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("config", FULL_RANK, ids=config_id)
def test_full_rank_changes_are_exact_at_full_rank(config):
    model = wrapped_block(config)
    (layer,) = scl_layers(model)
    export = to_lora(model, "x", r=D, dtype=torch.float64)
    torch.testing.assert_close(_exported_change(export), _dense_change(layer, config)[0], rtol=0, atol=1e-12)
    assert export.error < 1e-13


def test_the_error_counts_the_rounding_to_the_dtype_of_the_weights():
    model = wrapped_block(LOW_RANK[2])
    errors = [to_lora(model, "x", dtype=dtype).error for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert errors[0] < 1e-14 < 1e-9 < errors[1] < 1e-7 < 1e-4 < errors[2] < 1e-2


def test_the_total_error_is_over_all_modules_and_ranks_are_padded_to_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(M, 3), nn.Linear(M, D)

        def forward(self, x):
            return self.small(x), self.large(x)

    torch.manual_seed(0)
    plain = Two()
    model = get_peft_model(
        plain,
        SclConfig(
            r=2,
            variant="bottleneck",
            train_down_proj="full",
            target_modules=["small", "large"],
            init_weights=False,
        ),
    )
    changes = {
        name: layer.get_delta_weight("default").double()
        for name, layer in (("small", plain.small), ("large", plain.large))
    }
    export = to_lora(model, r=5)
    distances = {name: (_exported_change(export, name) - change).norm() for name, change in changes.items()}
    norms = {name: change.norm() for name, change in changes.items()}
    for name in changes:
        assert export.errors[name] == pytest.approx((distances[name] / norms[name]).item(), rel=1e-3, abs=1e-7)
    total = (sum(x**2 for x in distances.values()) / sum(x**2 for x in norms.values())) ** 0.5
    assert export.error == pytest.approx(total.item(), rel=1e-3)
    assert export.errors["small"] < 1e-6 < 1e-3 < export.errors["large"]
    assert export.config.r == 5 and not export.config.rank_pattern
    assert export.state_dict["base_model.model.small.lora_A.weight"].shape == (5, M)
    assert not export.state_dict["base_model.model.small.lora_A.weight"][3:].any()


def test_an_untrained_adapter_is_exported_as_no_change():
    for variant in ("compress", "bottleneck"):
        model = get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(r=4, variant=variant))
        assert to_lora(model).error == 0
        assert to_lora(model, r=2).error == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5", "siglip_classification"])
def test_the_exported_adapter_gives_the_same_logits_and_touches_no_other_module(architecture):
    model = _model(architecture, r=4)
    inputs = {"input_ids": TOKENS}
    if architecture == "t5":
        inputs["decoder_input_ids"] = TOKENS
    if architecture == "siglip_classification":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    expected, export = model(**inputs).logits, to_lora(model)
    lora = _with_lora(export, ARCHITECTURES[architecture].build())
    wrapped = {
        name.removeprefix("base_model.model.") for name, module in lora.named_modules() if hasattr(module, "lora_A")
    }
    assert wrapped == ARCHITECTURES[architecture].target_names == set(export.errors)
    torch.testing.assert_close(lora(**inputs).logits, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(lora.merge_and_unload()(**inputs).logits, expected, rtol=0, atol=5e-6)
    assert not torch.allclose(expected, ARCHITECTURES[architecture].build()(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize(
    "choice",
    [
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.layers\.1\.mlp\.down_proj"},
        {"exclude_modules": ["layers.0.mlp.down_proj"]},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_only_the_chosen_layers_are_exported(choice):
    model = _model("llama", r=4, **choice)
    export = to_lora(model)
    assert export.config.target_modules == {"model.layers.1.mlp.down_proj"}
    lora = _with_lora(export, ARCHITECTURES["llama"].build())
    torch.testing.assert_close(lora(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=5e-6)


def test_a_name_that_is_the_ending_of_another_one_becomes_a_regular_expression():
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"down": nn.Linear(M, D), "block": nn.ModuleDict({"down": nn.Linear(M, D)})})

    model = get_peft_model(build(), SclConfig(r=2, target_modules="down", init_weights=False))
    export = to_lora(model)
    lora = _with_lora(export, build())
    assert [name for name, module in lora.named_modules() if hasattr(module, "lora_A")] == ["base_model.model.down"]


def test_each_adapter_is_exported_as_if_it_were_alone():
    first, second = {"r": 2}, {"r": 3, "train_down_proj": "none"}
    model = wrapped_block(first, second)
    (layer,) = scl_layers(model)
    for name, config in (("x", first), ("y", second)):
        export = to_lora(model, name, dtype=torch.float64)
        torch.testing.assert_close(_exported_change(export), _dense_change(layer, config, name)[0], rtol=0, atol=1e-13)


def test_trained_modules_and_tokens_come_along(tmp_path):
    model = _model("bert", r=4, modules_to_save=["classifier"], trainable_token_indices=[3, 5], task_type="SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(1)
    expected = model(TOKENS).logits
    to_lora(model).save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert (saved.peft_type, saved.task_type, saved.inference_mode) == ("LORA", "SEQ_CLS", True)
    restored = PeftModel.from_pretrained(ARCHITECTURES["bert"].build(), tmp_path).eval()
    torch.testing.assert_close(restored(TOKENS).logits, expected, rtol=0, atol=5e-6)


def test_an_adapter_of_a_transformers_model_is_exported_too():
    torch.manual_seed(1)
    base = ARCHITECTURES["llama"].build()
    base.add_adapter(SclConfig(r=4, init_weights=False), adapter_name="default")
    export = to_lora(base)
    lora = _with_lora(export, ARCHITECTURES["llama"].build())
    torch.testing.assert_close(lora(TOKENS).logits, base(TOKENS).logits, rtol=0, atol=5e-6)


def test_a_bfloat16_base_is_read_without_another_rounding():
    model = wrapped_block(LOW_RANK[2], dtype=torch.bfloat16)
    (layer,) = scl_layers(model)
    export = to_lora(model, "x")
    assert all(tensor.dtype == torch.float32 for tensor in export.state_dict.values())
    torch.testing.assert_close(_exported_change(export), _dense_change(layer, LOW_RANK[2])[0], rtol=1e-5, atol=1e-6)


def test_a_quantised_base_is_exported_from_its_dequantised_weight():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantised = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32))
    quantised.load_state_dict(plain.state_dict())
    quantised = quantised.to("cpu")  # quantises
    dense = bnb.functional.dequantize_4bit(quantised[0].weight.data, quantised[0].weight.quant_state).double()
    model = get_peft_model(quantised, SclConfig(r=3, variant="bottleneck", target_modules=["0"], init_weights=False))
    (layer,) = scl_layers(model)
    maps = dense_maps(layer, "default")
    expected = (dense + maps["delta"]) @ (torch.eye(64) + maps["B"] @ maps["A"]) - dense
    torch.testing.assert_close(_exported_change(to_lora(model), "0"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("config", LOW_RANK[1:5], ids=config_id)
def test_convert_to_lora_of_peft_reads_a_linear_layer(config, base):
    torch.manual_seed(0)
    block = Block(base, torch.float32)
    model = get_peft_model(block, SclConfig(target_modules=["down"], init_weights=False, **config))
    assert model.supports_lora_conversion()
    change, _ = _dense_change(block.down, config, "default")
    delta = block.down.get_delta_weight("default")
    assert delta.shape == block.down.weight.shape
    torch.testing.assert_close(delta.T if base == "conv1d" else delta, change.float(), rtol=1e-5, atol=1e-6)

    _, state_dict = convert_to_lora(model, rank=D)
    product = state_dict["base_model.model.down.lora_B.weight"] @ state_dict["base_model.model.down.lora_A.weight"]
    torch.testing.assert_close(product, change.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{"activation": "gelu"}, {"scl_bias": True}, *FULL_RANK], ids=config_id)
def test_convert_to_lora_of_peft_refuses_what_it_would_change(config):
    model = wrapped_block({"r": 2, **config})
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2, adapter_name="x")


@pytest.mark.parametrize(
    ("config", "r", "message"),
    [
        ({"activation": "gelu"}, None, "no LoRA equals it"),
        ({"activation": "gelu", "variant": "compress"}, 2, "no LoRA equals it"),
        (
            {"variant": "bottleneck", "train_down_proj": "full"},
            None,
            rf"train_down_proj='full'.*`r={D}` is exact",
        ),
        ({"keep_residual": False}, None, rf"keep_residual=False.*`r={D}` is exact"),
        ({"variant": "bottleneck", "train_down_proj": "none"}, 3, "no rank above 2"),
        ({"variant": "compress"}, 5, "no rank above 4"),
        ({"keep_residual": False}, D + 1, f"no rank above {D}"),
        ({}, 0, "`r` should be a positive integer value but the value passed is 0"),
    ],
    ids=str,
)
def test_what_is_no_lora_is_refused(config, r, message):
    model = wrapped_block({"r": 2, **config})
    with pytest.raises(ValueError, match=message):
        to_lora(model, "x", r=r)


def test_a_merged_adapter_an_unknown_name_and_another_method_are_refused():
    model = wrapped_block({"r": 2})
    with pytest.raises(
        ValueError, match=r"no SCL or FeDeRA adapter 'default'; its adapters of these kinds are \['x'\]"
    ):
        to_lora(model)
    with pytest.raises(ValueError, match="no SCL or FeDeRA adapter"):
        to_lora(nn.Linear(2, 2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="Call `unmerge_adapter` first"):
        to_lora(model, "x")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="no SCL or FeDeRA adapter"):
        to_lora(_with_lora(to_lora(model, "x"), Block()))


def test_an_offloaded_weight_is_refused():
    model = wrapped_block({"r": 2})
    (layer,) = scl_layers(model)
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="without offloading"):
        to_lora(model, "x")


# ---- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the base model, an adapter per task, and its logits."""
    folder = tmp_path_factory.mktemp("saved")
    for architecture, task, config in (
        ("llama", "CAUSAL_LM", {}),
        ("gpt2", None, {}),
        ("llama", "CAUSAL_LM", {"train_down_proj": "full", "variant": "bottleneck"}),
        ("llama", "CAUSAL_LM", {"activation": "gelu"}),
    ):
        name = next(iter(config.values()), architecture)
        base = ARCHITECTURES[architecture].build()
        base.save_pretrained(folder / "base" / architecture)
        base.name_or_path = str(folder / "base" / architecture)
        torch.manual_seed(1)
        model = get_peft_model(base, SclConfig(r=4, init_weights=False, task_type=task, **config)).eval()
        model.save_pretrained(folder / name)
        torch.save(model(TOKENS).logits, folder / name / "logits.pt")
    return folder


_LOAD_WITHOUT_SCL = """
    import sys

    sys.modules["peft_scl"] = None  # importing it raises
    import torch
    from peft import AutoPeftModel, AutoPeftModelForCausalLM

    _, output, saved = sys.argv
    for name, loader in (("llama", AutoPeftModelForCausalLM), ("gpt2", AutoPeftModel)):
        model = loader.from_pretrained(f"{output}/{name}").eval()
        with torch.no_grad():
            logits = model(torch.arange(1, 9)[None]).logits
        torch.testing.assert_close(logits, torch.load(f"{saved}/{name}/logits.pt"), rtol=0, atol=5e-6)
        print(name, type(model.base_model).__name__)
"""


@pytest.mark.slow
def test_the_command_writes_adapters_that_load_without_peft_scl(saved, tmp_path):
    output = str(tmp_path / "llama")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "peft_scl.convert", str(saved / "llama"), output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"LoRA of rank 8 on {LAYERS} modules, exact up to the rounding to float32" in result.stdout
    assert f"PeftModel.from_pretrained(base_model, {output!r})" in result.stdout

    main([str(saved / "gpt2"), str(tmp_path / "gpt2")])
    command = [sys.executable, "-c", textwrap.dedent(_LOAD_WITHOUT_SCL), str(tmp_path), str(saved)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "llama LoraModel\ngpt2 LoraModel\n"


def test_the_command_truncates_and_says_by_how_much(saved, tmp_path, capsys):
    main([str(saved / "full"), str(tmp_path / "lora"), "--r", "3", "--dtype", "bfloat16"])
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()}
    assert shapes == {((3, FFN), torch.bfloat16), ((HIDDEN, 3), torch.bfloat16)}
    printed = capsys.readouterr().out.splitlines()
    model = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), saved / "full")
    export = to_lora(model, r=3, dtype=torch.bfloat16)
    for line, error in zip(printed, [*export.errors.values(), export.error], strict=False):
        assert line.endswith(f"relative error {error:.2e}")
    assert "best approximation of rank 3" in printed[-2]


def test_the_command_reads_the_base_model_it_is_told_to(saved, tmp_path):
    main([str(saved / "llama"), str(tmp_path / "lora"), "--base_model", str(saved / "base" / "llama")])
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(saved / "base" / "llama")


def test_the_command_reads_an_adapter_from_the_hub(saved, tmp_path, hub, capsys):
    huggingface_hub.create_repo("user/scl")
    huggingface_hub.upload_folder(repo_id="user/scl", folder_path=saved / "llama")
    main(["user/scl", str(tmp_path / "lora")])
    assert "LoRA of rank 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="user/nothing"):
        main(["user/nothing", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("adapter", "arguments", "message"),
    [
        ("gelu", [], "no LoRA equals it"),
        ("full", [], "Name a rank `r`"),
        ("full", ["--r", "99"], f"no rank above {HIDDEN}"),
        ("base", [], "Can't find 'adapter_config.json'"),
    ],
)
def test_errors_of_the_command_are_sentences_and_write_nothing(saved, tmp_path, adapter, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([str(saved / adapter), str(tmp_path / "lora"), *arguments])
    assert not (tmp_path / "lora").exists()


def test_the_command_overwrites_only_when_told_to(saved, tmp_path):
    output = tmp_path / "lora"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    arguments = [str(saved / "llama"), str(output)]
    with pytest.raises(SystemExit, match="is not empty"):
        main(arguments)
    main([*arguments, "--overwrite"])
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    }
    with pytest.raises(SystemExit, match="not one that SCL or FeDeRA has saved"):
        main([str(output), str(tmp_path / "again")])
    with pytest.raises(SystemExit, match="folder of the adapter itself"):
        main([str(saved / "llama"), str(saved / "llama"), "--overwrite"])
