# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What would silently do nothing, or something else than was trained, is refused or reported."""

import dataclasses
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers.models import TOKENS
from helpers.scl_models import ARCHITECTURES, FFN, HIDDEN
from helpers.scl_reference import Block, D, scl_layers
from peft_scl import SclConfig


def _llama(**changes):
    llama = ARCHITECTURES["llama"]
    return dataclasses.replace(llama, config={**llama.config, **changes}).build()


def _bloom(slow_but_exact):
    config = transformers.BloomConfig(
        vocab_size=64, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=slow_but_exact
    )
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_model_that_goes_past_its_down_projections_is_refused(task_type, call):
    def run(model):
        return model(input_ids=TOKENS) if call == "forward" else model.generate(input_ids=TOKENS, max_new_tokens=2)

    config = SclConfig(r=4, task_type=task_type)
    run(get_peft_model(_bloom(slow_but_exact=False), config))
    model = get_peft_model(_bloom(slow_but_exact=True), config)
    message = (
        r"2 modules with an active SCL adapter \(the first: transformer\.h\.0\.mlp\.dense_4h_to_h\), but its forward pass "
        "called none of them"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            run(model)
    with model.disable_adapter():
        run(model)
    model.merge_adapter()  # what reads the weight reads the merged one
    run(model)


class _TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = Block(), Block()

    def forward(self, x, image=None):
        return self.text(x) if image is None else self.text(x) + self.vision(image)


def test_a_part_that_is_not_used_is_reported_once():
    model = get_peft_model(_TwoTowers(), SclConfig(r=4, target_modules=["down"]))
    x = torch.randn(3, D, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="1 of 2 modules with an active SCL adapter were not called .*: vision.down. That"
    ):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    # wrapping further modules asks the question again
    model = get_peft_model(_TwoTowers(), SclConfig(r=4, target_modules=["text.down"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    model.add_adapter("other", SclConfig(r=4, target_modules=["vision.down"]))
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="The model has 1 modules with an active SCL adapter"):
        model(x)


def test_the_check_of_the_first_forward_leaves_nothing_behind():
    model = get_peft_model(_llama(), SclConfig(r=4, variant="bottleneck", init_weights=False))
    keys = model.state_dict().keys()
    seen = []
    model.get_base_model().lm_head.register_forward_hook(
        lambda *_: seen.append([len(layer._forward_pre_hooks) for layer in scl_layers(model)])
    )
    first, second = (model(input_ids=TOKENS).logits for _ in range(2))
    assert seen == [[1, 1], [0, 0]]
    assert torch.equal(first, second)
    assert model.state_dict().keys() == keys
    model.get_base_model().model.embed_tokens.weight.data = torch.empty(0)
    model.base_model._calls_checked = False
    with pytest.raises(Exception, match="'weight' must be 2-D"):  # an error of the model's own passes through
        model(input_ids=TOKENS)
    assert not any(layer._forward_pre_hooks for layer in scl_layers(model))


def test_batches_with_mixed_adapters_are_refused():
    model = get_peft_model(_llama(), SclConfig(r=4))
    with pytest.raises(ValueError, match="SCL does not support batches with mixed adapters"):
        model(input_ids=TOKENS, adapter_names=["default", "__base__"])


WIDTHS = [
    ({"intermediate_size": FFN + 8}, "scl_A", (4, FFN), (4, FFN + 8)),
    ({"hidden_size": 2 * HIDDEN}, "scl_delta_B", (HIDDEN, 4), (2 * HIDDEN, 4)),
]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("changes", "part", "found", "needed"), WIDTHS, ids=["ffn", "hidden"])
def test_an_adapter_of_another_width_is_refused(changes, part, found, needed, low_cpu_mem_usage, tmp_path):
    get_peft_model(_llama(), SclConfig(r=4, variant="bottleneck", init_weights=False)).save_pretrained(tmp_path)
    message = rf"{part}\.\w+\.weight has the shape \({found[0]}, {found[1]}\) in the checkpoint, but \({needed[0]}, {needed[1]}\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(_llama(**changes), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    model = get_peft_model(_llama(**changes), SclConfig(r=2, init_weights=False))
    expected = model(input_ids=TOKENS).logits
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    with pytest.raises(ValueError, match=message):  # reinitialised parts are of no use either
        PeftModel.from_pretrained(_llama(**changes), tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(("changes", "part", "found", "needed"), WIDTHS, ids=["ffn", "hidden"])
def test_transformers_refuses_an_adapter_of_another_width(changes, part, found, needed, tmp_path, caplog):
    get_peft_model(_llama(), SclConfig(r=4, variant="bottleneck", init_weights=False)).save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`, thus raising an error"):
            _llama(**changes).load_adapter(str(tmp_path))
    finally:
        transformers.utils.logging.disable_propagation()
    lines = [line for line in caplog.text.splitlines() if part in line and "MISMATCH" in line]
    assert lines
    assert f"{list(found)}" in lines[0]
    assert f"{list(needed)}" in lines[0]


def test_an_adapter_for_more_or_fewer_layers_is_reported(tmp_path):
    get_peft_model(_llama(), SclConfig(r=4, variant="bottleneck", init_weights=False)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="4 SCL weights of the checkpoint have no place in this model .*layers.1"):
        PeftModel.from_pretrained(_llama(num_hidden_layers=1), tmp_path)
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint: .*layers.2"):
        PeftModel.from_pretrained(_llama(num_hidden_layers=3), tmp_path)


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_row_wise_tensor_parallel_layers_are_refused(mesh):
    block = parallelize_module(Block(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with pytest.raises(NotImplementedError, match="SCL does not support tensor parallelism"):
        get_peft_model(block, SclConfig(r=4, target_modules=["down"]))


def test_weights_sharded_by_fsdp_are_not_mistaken_for_tensor_parallel(mesh):
    block = distributed.fsdp.fully_shard(Block(), mesh=mesh)
    get_peft_model(block, SclConfig(r=4, variant="bottleneck", target_modules=["down"]))
    assert len(scl_layers(block)) == 1
