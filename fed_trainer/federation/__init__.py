# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The server's side and the rounds; no model is known here."""
