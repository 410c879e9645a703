# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised bases; skips the file that imports it where the libraries are not installed."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from .models import TOKENS


pytest.importorskip("bitsandbytes")
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig

QUANTIZATIONS = {
    "bnb 4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb 8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}
# bitsandbytes quantises the input of an 8-bit layer too, to one part in 127 of the largest entry of each row
INPUT_ERROR = {"bnb 4bit": 1e-5, "bnb 8bit": 2e-2, "torchao": 1e-5}


@torch.no_grad()
def quantized_logits(model: torch.nn.Module) -> torch.Tensor:
    # no dropout here; in eval mode, bitsandbytes repacks 4-bit layers on some CPUs
    return model.train()(input_ids=TOKENS).logits
