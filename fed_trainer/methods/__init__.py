# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The methods of the papers, pure, on dictionaries of tensors."""
