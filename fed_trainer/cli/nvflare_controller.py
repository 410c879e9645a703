# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The workflow of the jobs that `fed-trainer nvflare-job` writes. NVFlare imports this module, nobody else does."""

from __future__ import annotations

from ..federation.transport.nvflare import NVFlareJob
from ..federation.transport.nvflare.controller import CourierController
from .networks import with_keys
from .nvflare_job import RUN, keys_in
from .run_file import RunFile
from .serving import serve


__all__ = ["FedTrainerController"]


class FedTrainerController(CourierController):
    """Coordinates the run of a job; a run that was begun in the same `output_dir` goes on."""

    def run(self) -> None:
        """Called by NVFlare."""
        folder = self.folder()
        serve(RunFile.load(folder / RUN), with_keys(NVFlareJob(self), keys_in(folder)), resume=True)
