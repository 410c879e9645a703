# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One client: it owns model, engine, data and what it keeps."""
