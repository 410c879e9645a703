# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whose data it is, and how one dataset becomes that of many."""
