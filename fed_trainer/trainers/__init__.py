# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The classes that users write: a federation over the trainers of TRL and transformers."""
