# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What several test files need, by subject."""
