# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The dictionary of tensors that travels, and what is said and checked about it."""
