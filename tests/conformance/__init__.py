# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT's own generic tests, run against `SclConfig`. See docs/conformance.md."""
