# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Everything in PEFT's suite that is treated differently for SCL, with the reason and the precedent: another method of
PEFT for which PEFT's own suite makes the same exception. Nothing else may fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from .settings import SETTINGS


NOT_MERGEABLE = tuple(name for name, setting in SETTINGS.items() if not setting.mergeable)
NOT_AT_BASE_MODEL = tuple(name for name, setting in SETTINGS.items() if not setting.starts_at_base_model)


@dataclass(frozen=True)
class Exclusion:
    """
    Tests that cannot hold for some settings. They are run and have to fail with `message` (a regular expression): one
    that passes, or fails with another message, counts as a failure.
    """

    tests: tuple[tuple[str, str], ...]  # suite, name of the test function
    settings: tuple[str, ...]
    message: str
    reason: str
    precedent: str

    def concerns(self, suite: str, test: str, setting: str) -> bool:
        return (suite, test) in self.tests and setting in self.settings


@dataclass(frozen=True)
class Deselection:
    """A test that is not generic although it takes a config class: it is not run."""

    suite: str
    test: str
    reason: str


@dataclass(frozen=True)
class LearningRate:
    """A test that is run with another learning rate of `torch.optim.SGD`."""

    suite: str
    test: str
    model_id: str
    lr: float
    reason: str
    precedent: str


@dataclass(frozen=True)
class LiftedSkip:
    """A function of PEFT's suite that would skip tests which SCL can pass: it does nothing here."""

    module: str
    function: str
    reason: str


EXCLUSIONS = (
    Exclusion(
        tests=(
            ("custom", "test_merge_layers"),
            ("custom", "test_merge_layers_fp16"),
            ("custom", "test_merge_layers_is_deterministic_in_train_mode"),
            ("custom", "test_merge_layers_is_idempotent"),
            ("custom", "test_safe_merge"),
            ("custom", "test_forward_float16"),
            ("custom", "test_forward_float16_no_autocast"),
            ("custom", "test_forward_bfloat16"),
            ("custom", "test_forward_bfloat16_no_autocast"),
            ("custom", "test_disable_adapters_with_merging"),
            ("custom", "test_delete_merged_adapter_raises_without_mutation"),
            ("custom", "test_delete_merged_adapter_only_rejects_the_merged_one"),
            ("custom", "test_multiple_active_adapters_merge_and_unmerge"),
            ("custom", "test_merge_layers_multi"),
            ("custom", "test_sequential_merge_matches_batch_merge"),
            ("custom", "test_unmerge_after_sequential_merge_restores_base"),
            ("decoder", "test_merge_layers"),
            ("decoder", "test_merge_layers_fp16"),
            ("decoder", "test_merge_layers_multi"),
            ("decoder", "test_merge_layers_nan"),
            ("encdec", "test_merge_layers"),
            ("feature", "test_merge_layers"),
        ),
        settings=NOT_MERGEABLE,
        message="a non-linear map cannot be folded into a weight matrix",
        reason="A non-linear adapter cannot be merged, and says so.",
        precedent="Lily, ShadowPEFT and OSF (testing_common.py, _skip_if_merging_not_supported).",
    ),
    Exclusion(
        tests=(("custom", "test_disable_adapters"),),
        settings=NOT_AT_BASE_MODEL,
        message="allclose",
        reason="The test asserts that a fresh adapter changes nothing, but these do not start at the base model.",
        precedent="DEFT with para=True (PaRa), for which the test leaves out this assertion and compares with the base model.",
    ),
    Exclusion(
        tests=(("custom", "test_disable_adapters_with_merging"),),
        settings=tuple(name for name in NOT_AT_BASE_MODEL if name not in NOT_MERGEABLE),
        message="allclose",
        reason="The test takes the output of a fresh adapter for that of the base model, but these do not start there.",
        precedent="DEFT with para=True (PaRa), for which the test leaves out this assertion.",
    ),
)

DESELECTIONS = (
    Deselection(
        suite="custom",
        test="test_default_target_modules_list_of_str",
        reason="It lists LoRA and DeLoRA only and patches their own tables of default targets.",
    ),
    Deselection(
        suite="custom",
        test="test_default_target_modules_str",
        reason="It lists LoRA and DeLoRA only and patches their own tables of default targets.",
    ),
    Deselection(
        suite="decoder",
        test="test_prompt_learning_with_gradient_checkpointing",
        reason="It lists prompt-learning methods only and trains on a dataset of the Hub.",
    ),
)

LEARNING_RATES = (
    LearningRate(
        suite="custom",
        test="test_parameters_after_loading_model",
        model_id="MLP",
        lr=0.01,
        reason=(
            "With lr=0.5 and inputs up to 89, two bottlenecks one after the other can be NaN after three steps, before "
            "anything is saved."
        ),
        precedent="The test lowers it by class for VBLoRA, RandLora, UniLora and OSF (0.01 too), AdaLora, Pvera and others.",
    ),
    LearningRate(
        suite="custom",
        test="test_only_params_are_updated",
        model_id="EmbConv1D",
        lr=10.0,
        reason="With lr=0.5 the first factor, whose gradient starts at zero, moves by less than the tolerance of the test.",
        precedent="The test raises it to 100 for DoRA with this model, and for VBLoRA, HiRA, Lily and AdaMSS with every model.",
    ),
)

LIFTED_SKIPS = (
    LiftedSkip(
        module="testing_common",
        function="_skip_if_conv1d_not_supported",
        reason="It skips GPT-2 for every method but four that support transformers' Conv1D. SCL supports it.",
    ),
    LiftedSkip(
        module="test_decoder_models",
        function="check_beft_config",
        reason="It is meant for BEFT, which needs a bias, but tests `isinstance` of a class and so skips Llama and Gemma for all.",
    ),
)
