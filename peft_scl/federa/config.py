# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from ..card import update_federa_card
from ..foreign_files import FEDERA_CONFIG_NAME, check_config_file


__all__ = ["FederaConfig"]


# What of `LoraConfig` means the same here. Any other field has to keep its default.
_SHARED_FIELDS = frozenset(
    {
        *(item.name for item in fields(PeftConfig)),
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "trainable_token_indices", "runtime_config",
    }
)  # fmt: skip


@dataclass
class FederaConfig(LoraConfig):
    """
    Configuration of a [`FederaModel`]: FeDeRA (https://huggingface.co/papers/2404.18848), a LoRA that starts from the
    principal part of the pretrained weights.

    With `W = U S V^T` and the scaling `s` of LoRA, the factors start at `B0 = U_r sqrt(S_r / s)` and
    `A0 = sqrt(S_r / s) V_r^T`, and the layer computes `(W - s B0 A0 + s B A) x`: the pretrained model at the start,
    while the gradients of both factors are those of its principal directions. What training changes,
    `s (B A - B0 A0)`, is a LoRA of rank `2 r` for the untouched base model, and that is what `save_pretrained` writes.

    Args:
        r (`int`, *optional*, defaults to `8`):
            Rank of the trained factors, at most that of the weights. The saved adapter has the rank `2 r`.
        lora_alpha (`int`, *optional*, defaults to `8`):
            Scaling `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`. It does not change where
            training starts, but how far a step goes. Positive.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout probability on the input of the trained factors. These hold the principal part of the layer, of
            which dropout removes entries too, as with PiSSA; 0 is advisable.
        keep_base (`bool`, *optional*, defaults to `False`):
            `False` writes the residual `W - s B0 A0` into the base model, as in the paper: a step costs as much as one
            of LoRA, each weight of the targeted layers is rounded once, and the model can have this one adapter only.
            `True` leaves the base model as it is and subtracts `s B0 A0 x` in the forward: exact, with several
            adapters, also on quantised weights, at the cost of a LoRA of rank `2 r`.
        init_lora_weights (`bool`, *optional*, defaults to `True`):
            Start as described above. `False` leaves the base model as it is and starts at random, without a start to
            subtract, to be overwritten by a saved adapter; see [`load_federa`].
        target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, \
        use_rslora, fan_in_fan_out, bias, modules_to_save, trainable_token_indices:
            As in [`~peft.LoraConfig`].

    Raises:
        ValueError: For a value outside of these ranges, or a field of `LoraConfig` that FeDeRA has no use for.
    """

    keep_base: bool = field(
        default=False,
        metadata={
            "help": "Leave the base weights as they are and subtract the start in the forward, instead of writing the "
            "residual into the base model."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["FEDERA"]
        for item in fields(self):
            if item.name in _SHARED_FIELDS or item.name == "keep_base":
                continue
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if getattr(self, item.name) != default:
                raise ValueError(
                    f"`{item.name}` is {getattr(self, item.name)!r}, but FeDeRA is a plain LoRA with a start of its "
                    f"own and does not support this option of `LoraConfig`. Leave `{item.name}` out, or use "
                    "`LoraConfig`."
                )
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"`init_lora_weights` is {self.init_lora_weights!r}, but FeDeRA is an initialisation itself. Leave it "
                "out, or use `LoraConfig`."
            )
        ranks, alphas = {"r": self.r, **(self.rank_pattern or {})}, {"lora_alpha": self.lora_alpha}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"`{name}` should be a positive integer value but the value passed is {rank!r}")
        for name, alpha in {**alphas, **(self.alpha_pattern or {})}.items():
            if not alpha > 0:
                raise ValueError(
                    f"`{name}` should be positive but the value passed is {alpha!r}: the start of FeDeRA is divided "
                    "by the scaling."
                )

    def to_lora_config(self) -> LoraConfig:
        """The configuration of the saved adapter: a plain LoRA of twice the rank with the same scaling."""
        values = {name: getattr(self, name) for name in _SHARED_FIELDS - {"peft_type", "init_lora_weights"}}
        factor = 2**0.5 if self.use_rslora else 2  # the scaling is alpha / r, or alpha / sqrt(r)
        values |= {
            "r": 2 * self.r,
            "rank_pattern": {name: 2 * rank for name, rank in (self.rank_pattern or {}).items()},
            "lora_alpha": factor * self.lora_alpha,
            "alpha_pattern": {name: factor * alpha for name, alpha in (self.alpha_pattern or {}).items()},
        }
        return LoraConfig(**values)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save the configuration of the plain LoRA as `adapter_config.json`, which is what the weights beside it are,
        this configuration as `federa_config.json`, and a section in the `README.md`.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder of the adapter.
            kwargs:
                As in [`~peft.PeftConfig.save_pretrained`].
        """
        folder = Path(save_directory)
        auto_mapping = kwargs.get("auto_mapping_dict")
        self.to_lora_config().save_pretrained(os.fspath(folder), **kwargs)
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        values["auto_mapping"] = auto_mapping or self.auto_mapping
        (folder / FEDERA_CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
        # PEFT and transformers write the model card before the config, and the config is what we own of the two
        update_federa_card(folder, self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> FederaConfig:
        """
        Read the `federa_config.json` of a saved adapter.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub id of the adapter.
            subfolder (`str`, *optional*):
                Folder below that.
            kwargs:
                Passed to [`~huggingface_hub.hf_hub_download`].

        Raises:
            ValueError: If there is none.
        """
        source = os.fspath(pretrained_model_name_or_path)
        path = Path(source, subfolder or "", FEDERA_CONFIG_NAME)
        if not path.is_file():
            try:
                if os.path.isdir(source):
                    raise EntryNotFoundError(f"{source} is a folder without it")
                path = Path(hf_hub_download(source, FEDERA_CONFIG_NAME, subfolder=subfolder, **kwargs))
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                raise ValueError(
                    f"There is no {FEDERA_CONFIG_NAME} in {source!r}, so it is not an adapter that FeDeRA has saved. "
                    "Load it as what its adapter_config.json says (`PeftModel.from_pretrained`)."
                ) from error
        check_config_file(path)
        return cls.from_peft_type(**cls.from_json_file(os.fspath(path)))
