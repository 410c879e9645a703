# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes `SCL` and `FEDERA` PEFT types like any other.

`peft.PeftType` is a closed enum without a plugin mechanism, and `peft.utils.register_peft_method`, the only official
entry, accepts names that are members of it. Code in peft and transformers reads `peft_type.value`, so a plain string
does not do: a real member is added, once, and registered at once.
"""

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


__all__ = ["register_tuner"]


def register_tuner(
    name: str, config_cls: type[peft.PeftConfig], model_cls: type[BaseTuner], prefix: str | None = None
) -> None:
    """
    Add `name` to [`~peft.PeftType`] and register its config and model classes; a second call changes nothing.

    Args:
        name (`str`):
            Name of the method in lower case. The enum value is its upper case, the state dict prefix `name + "_"`
            (transformers derives the one from the other when it deletes an adapter).
        config_cls (`type`):
            Subclass of [`~peft.PeftConfig`].
        model_cls (`type`):
            Subclass of [`~peft.tuners.tuners_utils.BaseTuner`].
        prefix (`str`, *optional*):
            State dict prefix of a method that shares the one of another.

    Raises:
        ImportError: If PEFT itself, or another package, already owns a method of this name.
    """
    value = name.upper()
    if value in PeftType.__members__:
        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[value])
        # the qualified name, so that a reloaded module is recognised as ourselves
        if registered is None or _qualified(registered) != _qualified(config_cls):
            owner = "peft itself" if registered is None else _qualified(registered)
            raise ImportError(
                f"peft {peft.__version__} already has a method `{value}` (from {owner}), so this package cannot "
                "register its own under that name. Use that implementation, or install a peft release without it."
            )
        return

    # The functional equivalent of a line `SCL = "SCL"` in the class body. `EnumType._add_member_` exists on Python
    # 3.13 only and leaves the member out of iteration.
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    PeftType._value2member_map_[value] = member
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
