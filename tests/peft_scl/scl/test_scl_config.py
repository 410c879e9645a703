# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The config, and the registration of the PEFT type."""

import ast
import copy
import importlib
import json
import pickle
import re

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_scl
from helpers.paths import ROOT
from helpers.scl_reference import Block
from peft_scl import SclConfig, SclModel
from peft_scl.registration import register_tuner


DOCS = ROOT / "docs" / "scl.md"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 0, "`r` should be a positive integer value but the value passed is 0"),
        ("r", -1, "`r` should be a positive integer value but the value passed is -1"),
        ("r", 2.0, "`r` should be a positive integer value but the value passed is 2.0"),
        ("r", True, "`r` should be a positive integer value but the value passed is True"),
        ("down_proj_r", 0, "`down_proj_r` should be a positive integer value but the value passed is 0"),
        (
            "variant",
            "serial",
            "`variant` should be one of ['compress', 'bottleneck'] but the value passed is 'serial'",
        ),
        ("train_down_proj", "lora", "`train_down_proj` should be one of ['none', 'low_rank', 'full'] but the value"),
        ("activation", "none", "but the value passed is 'none'"),
        ("scaling", 0.0, "`scaling` should be positive and finite but the value passed is 0.0"),
        ("scaling", -1.0, "`scaling` should be positive and finite but the value passed is -1.0"),
        ("scaling", float("inf"), "`scaling` should be positive and finite but the value passed is inf"),
        ("scaling", float("nan"), "`scaling` should be positive and finite but the value passed is nan"),
        ("scl_dropout", 1.0, "`scl_dropout` should be in [0, 1) but the value passed is 1.0"),
        ("scl_dropout", -0.1, "`scl_dropout` should be in [0, 1) but the value passed is -0.1"),
        (
            "layers_pattern",
            "layers",
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
        ),
    ],
)
def test_values_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SclConfig(**{field: value})


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_a_regular_expression_excludes_layer_selection(field):
    with pytest.raises(ValueError, match=f"`{field}` cannot be used when `target_modules` is a str."):
        SclConfig(target_modules=r".*\.down_proj", **{field: 0 if field == "layers_to_transform" else "layers"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "bottleneck", "keep_residual": False}, "`keep_residual=False` has no effect"),
        ({"train_down_proj": "full"}, "`train_down_proj` and `down_proj_r` have no effect"),
        ({"down_proj_r": 4}, "`train_down_proj` and `down_proj_r` have no effect"),
    ],
    ids=str,
)
def test_fields_without_effect_are_reported(fields, message):
    with pytest.warns(UserWarning, match=message):
        SclConfig(**fields)


def test_layer_zero_is_a_layer():
    assert SclConfig(layers_to_transform=0, layers_pattern="layers").layers_to_transform == 0


def test_compress_rank_is_limited_by_the_weight():
    message = (
        "`r` is 8, but `keep_residual=False` replaces a down projection of shape (7, 12), which has no more than 7"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(Block(), SclConfig(r=8, keep_residual=False, target_modules=["down"]))


def test_activations_with_parameters_are_refused():
    with pytest.raises(ValueError, match="`activation='prelu'` has parameters of its own"):
        get_peft_model(Block(), SclConfig(r=4, activation="prelu", target_modules=["down"]))


def test_only_a_linear_adapter_is_mergeable():
    assert SclConfig().is_mergeable
    assert SclConfig(variant="compress").is_mergeable
    assert not SclConfig(activation="gelu").is_mergeable


@pytest.mark.filterwarnings("ignore:.*have no effect with `variant='compress'`:UserWarning")
def test_config_survives_saving_pickling_and_copying(tmp_path):
    config = SclConfig(
        r=4, variant="compress", activation="gelu", scaling=0.5, scl_dropout=0.1, scl_bias=True, down_proj_r=2,
        target_modules=["b", "a"], exclude_modules=["c"], layers_to_transform=[0, 2], modules_to_save=["head"],
        task_type="CAUSAL_LM", inference_mode=True,
    )  # fmt: skip
    assert config.target_modules == {"a", "b"}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SCL"
    for restored in (
        PeftConfig.from_pretrained(tmp_path),
        SclConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(restored) is SclConfig
        assert restored == config
        assert restored.peft_type is PeftType.SCL


def test_every_field_is_documented_twice():
    for name, field in SclConfig.__dataclass_fields__.items():
        if name not in PeftConfig.__dataclass_fields__:
            assert field.metadata["help"], name
            assert f"{name} (`" in SclConfig.__doc__, name


def test_the_type_is_a_member_like_any_other():
    member = PeftType.SCL
    assert isinstance(member, PeftType)
    assert member is PeftType("SCL") is PeftType["SCL"]
    assert member in set(PeftType)
    assert list(PeftType).count(member) == 1
    assert (member.name, member.value, member) == ("SCL", "SCL", "SCL")
    assert hash(member) == hash("SCL")
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"SCL"'
    assert member != PeftType.LORA


def test_the_type_is_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SCL] is SclConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SCL] is SclModel
    # transformers' `delete_adapter` derives the prefix from the type
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SCL] == SclModel.prefix == PeftType.SCL.value.lower() + "_"
    assert isinstance(peft.get_peft_config({"peft_type": "SCL", "r": 3}), SclConfig)


def test_registering_again_changes_nothing():
    members, mapping = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register_tuner("scl", SclConfig, SclModel)
    importlib.reload(peft_scl)
    importlib.reload(peft_scl.registration)
    assert list(PeftType) == members
    assert mapping == PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_reloaded_config_class_is_recognised():
    reloaded = type("SclConfig", (SclConfig,), {"__module__": SclConfig.__module__})
    register_tuner("scl", reloaded, SclModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SCL] is SclConfig


def test_a_foreign_type_of_the_same_name_is_refused(monkeypatch):
    foreign = type("SclConfig", (PeftConfig,), {"__module__": "elsewhere"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SCL, foreign)
    message = rf"peft {re.escape(peft.__version__)} already has a method `SCL` \(from elsewhere.SclConfig\)"
    with pytest.raises(ImportError, match=message):
        register_tuner("scl", SclConfig, SclModel)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SCL)
    with pytest.raises(ImportError, match=r"already has a method `SCL` \(from peft itself\)"):
        register_tuner("scl", SclConfig, SclModel)


def test_the_table_in_the_docs_lists_every_field_and_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", DOCS.read_text(), flags=re.MULTILINE)
    own = {
        name: f for name, f in SclConfig.__dataclass_fields__.items() if name not in PeftConfig.__dataclass_fields__
    }
    assert [name for name, _ in rows] == list(own)
    for name, default in rows:
        assert ast.literal_eval(default) == own[name].default, name


def test_the_examples_in_the_docs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    examples = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(examples) == 8
    for example in examples:
        exec(example, namespace)
