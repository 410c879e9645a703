# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

from ....state.checks import check_number
from ..ends import ClientEnd, Network, NetworkError, ServerEnd
from .attach import ClientAPI, read_profile
from .client import NVFlareClientEnd
from .messages import Courier
from .server import NVFlareServerEnd


__all__ = ["NVFlare", "NVFlareJob"]


class NVFlare(Network):
    """
    A job of NVFlare, as a site sees it. The coordinator of such a run is the job itself: `fed-trainer nvflare-job`
    writes it.

    Args:
        profile (`str` or `os.PathLike`):
            The file with which the site's NVFlare client attaches this process; `fed-trainer nvflare-kit` writes it.
        patience (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for a job.

    Example:

    ```python
    >>> from fed_trainer.federation.transport.nvflare import NVFlare

    >>> trainer.join(NVFlare("prod_00/site-1/fed_trainer.json"), "site-1")
    ```
    """

    def __init__(self, profile: str | os.PathLike, patience: float = 600.0) -> None:
        check_number("patience", patience, lambda number: number > 0, "a positive number of seconds")
        self._profile, self._patience = profile, patience

    def server_end(self) -> ServerEnd:
        raise NetworkError(
            "Over NVFlare the coordinator is a job. Write it (`fed-trainer nvflare-job RUN.yaml --to FOLDER`) and "
            "submit it (`nvflare job submit -j FOLDER --startup-kit KIT`)."
        )

    def client_end(self, client: str) -> ClientEnd:
        site = read_profile(self._profile)["site_name"]
        if site != client:
            raise NetworkError(
                f"The NVFlare profile {os.fspath(self._profile)!r} is that of site {site!r}, but the client is "
                f"{client!r}. A client has the name of its site: `--name {site}`."
            )
        return NVFlareClientEnd(ClientAPI(self._profile), client, self._patience)


class NVFlareJob(Network):
    """
    A job of NVFlare, as its server sees it.

    Args:
        courier ([`Courier`]):
            What NVFlare gives.
    """

    def __init__(self, courier: Courier) -> None:
        self._courier = courier

    def server_end(self) -> ServerEnd:
        return NVFlareServerEnd(self._courier)

    def client_end(self, client: str) -> ClientEnd:
        raise NetworkError("In an NVFlare job there are no clients: they run at the sites (`fed-trainer join`).")
