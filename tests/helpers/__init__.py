# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What several test files need, by subject."""

import logging


# Transformers and PEFT, which come after this, import what quantises where they can; it tells of kernels for GPUs that
# it misses
for _name in ("bitsandbytes", "torch.utils._pytree", "torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
