# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer join --at ADDRESS --name NAME --data FILES`"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..client.invitations import check_versions, received_settings
from ..client.process import DeclinedError, Gate, take_part
from ..federation.packet import Packet
from ..federation.transport.ends import Network
from ..output.run_lock import owning
from ..output.settings import MAY_DIFFER
from ..trainers.taking_part import TakingPart
from .building import build_trainer
from .data import DataFields, load_rows
from .run_file import TRAINERS, config_of, peft_config_of


__all__ = ["CommandSite", "SiteOptions", "join"]

logger = logging.get_logger(__name__)

# of what `from_pretrained` takes: `weights_only=False`, for one, would unpickle what a model comes with
HARMLESS_INIT = frozenset(
    {
        "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "max_position_embeddings",
        "quantization_config", "revision", "rope_parameters", "subfolder", "tie_word_embeddings", "torch_dtype",
        "use_cache", "use_safetensors", "variant",
    }
)  # fmt: skip
OF_A_SITE = ("where things", "memory and speed", "the machine")  # reasons why settings may differ


@dataclass(frozen=True)
class SiteOptions:
    """
    What a site decides itself.

    Args:
        name (`str`):
            Name of the client.
        data (`Sequence[str]`):
            Its training rows, see [`load_rows`].
        eval_data (`Sequence[str]`, *optional*):
            Its held-out rows.
        output_dir (`str`):
            Folder for what it keeps.
        model (`str`, *optional*):
            Where the base model of the run is here; as the coordinator calls it, if not given.
        settings (`dict[str, Any]`, *optional*):
            Fields of the config that may differ from site to site.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the base model may run here.
    """

    name: str
    data: Sequence[str]
    output_dir: str
    eval_data: Sequence[str] | None = None
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        free = {name for why, names in MAY_DIFFER.items() if why.startswith(OF_A_SITE) for name in names}
        fixed = sorted(set(self.settings) - free)
        if fixed:
            raise ValueError(
                f"`{fixed[0]}` is a setting of the run, which the coordinator decides. A site may set what concerns "
                "its machine, such as `use_cpu`, `gradient_checkpointing` or `dataloader_num_workers`."
            )


class CommandSite:
    """
    A [`~fed_trainer.client.process.Site`] that makes its trainer when it is invited: all but data and policy comes
    from the coordinator.

    Args:
        options ([`SiteOptions`]):
            What the site decides itself.
        network ([`Network`]):
            Where the coordinator is met.
        gate ([`Gate`], *optional*):
            What stands between this process and the way out.
    """

    def __init__(self, options: SiteOptions, network: Network, gate: Gate | None = None) -> None:
        self._options, self._network, self._gate = options, network, gate
        self._rows = {options.name: load_rows(options.data)}
        self._held_out = {options.name: load_rows(options.eval_data)} if options.eval_data else None
        self._site: TakingPart | None = None

    def accept(self, client: str, invitation: Packet) -> Packet:
        """Make a trainer for the run, if there is none yet, and get ready."""
        if self._site is None:
            try:
                self._site = self._site_for(client, invitation.meta)
            except DeclinedError:
                raise
            except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
                raise DeclinedError(str(error)) from error
        return self._site.accept(client, invitation)

    def _site_for(self, client: str, run: Mapping[str, Any]) -> TakingPart:
        options, rows = self._options, self._rows[client]
        check_versions(run)
        if run.get("trainer") not in TRAINERS:
            raise DeclinedError(f"The run is one of the trainer {run.get('trainer')!r}, of {sorted(TRAINERS)}.")
        part, told = TRAINERS[str(run["trainer"])], run.get("told")
        settings, told = received_settings(run.get("settings")), told if isinstance(told, dict) else {}
        self._refuse_remote_code(settings)
        args = config_of(part, {**_not_default(part, settings), **options.settings, "output_dir": options.output_dir})
        if self._gate is not None:
            self._gate.check(run, client, len(rows), args.world_size)
        model = options.model or run.get("base_model")
        if not isinstance(model, str) or (options.model is None and run.get("base_is_local")):
            raise DeclinedError(
                f"The base model of the run ({model!r}) is a folder of the coordinator's machine. Say where the same "
                "model is here (`--model FOLDER_OR_ID`)."
            )
        logger.info(f"Loading {model}.")
        fields: Any = {"peft_type": run["peft_type"], **run["peft_config"]} if run.get("peft_type") else None
        trainer = build_trainer(
            part,
            model,
            args,
            peft_config_of(fields, run.get("task_type")),
            DataFields(**(told.get("data") or {})),
            told.get("num_labels"),
            self._rows,
            self._held_out,
            options.trust_remote_code,
        )
        return TakingPart(trainer, self._network, [client], self._gate)

    def _refuse_remote_code(self, settings: dict[str, Any]) -> None:
        """A model is loaded as the coordinator says, so what it says must not be able to make code of it run here."""
        if self._options.trust_remote_code:
            return
        init = settings.get("model_init_kwargs") or {}
        if bool(settings.get("trust_remote_code")) or (isinstance(init, dict) and init.get("trust_remote_code")):
            raise DeclinedError(
                "The run would load its base model with code that comes with it (`trust_remote_code`), which this "
                "site does not allow. Ask for another model, or allow it (`--trust-remote-code`)."
            )
        unknown = (
            sorted(set(init) - HARMLESS_INIT - {"trust_remote_code"}) if isinstance(init, dict) else ["(no fields)"]
        )
        attention = init.get("attn_implementation") if isinstance(init, dict) else None
        if "/" in str(attention):  # a kernel of the Hub, which is code
            unknown = ["attn_implementation"]
        if unknown:
            raise DeclinedError(
                f"The run would load its base model with `{unknown[0]}` (`model_init_kwargs`), which may let code "
                f"that comes with it run here. Leave it out ({sorted(HARMLESS_INIT)} are harmless), or allow such "
                "code (`--trust-remote-code`)."
            )

    def turn(self, packet: Packet) -> Packet:
        """A client's turn."""
        assert self._site is not None  # turns come after an invitation
        return self._site.turn(packet)

    def evaluate(self, packet: Packet) -> Packet:
        """A client's evaluation on its own held-out data."""
        assert self._site is not None
        return self._site.evaluate(packet)


def _not_default(part: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a coordinator those that are not what a config here has by itself."""
    ours = part.config(output_dir="unused", report_to="none").to_dict()
    return {name: value for name, value in settings.items() if name in ours and ours[name] != value}


def join(options: SiteOptions, network: Network, gate: Gate | None = None) -> str:
    """
    Take part in a run until it is over; returns how it has ended.

    Args:
        options ([`SiteOptions`]):
            What the site decides itself.
        network ([`Network`]):
            Where the coordinator is met.
        gate ([`Gate`], *optional*):
            What stands between this process and the way out.

    Raises:
        DeclinedError: If this site does not take part.
        EndedError: If the run was broken off, or nobody serves.
        NetworkError: If the network cannot be used.
        ValueError: For data that cannot be used.
    """
    site = CommandSite(options, network, gate)
    machine = {name: options.settings[name] for name in ("use_cpu", "ddp_backend") if name in options.settings}
    # starts the process group of a launch, as that of the run is going to be
    _ = TrainingArguments(options.output_dir, report_to="none", **machine).device
    with owning(Path(options.output_dir)):
        return take_part(site, network, [options.name], gate)
