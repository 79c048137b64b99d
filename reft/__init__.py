"""Representation finetuning (ReFT) of Hugging Face models.

    model = reft.get_reft_model(base_model, reft.ReftConfig(positions="f7+l7", rank=8))

Importing this package imports none of its modules: each name loads its module on first use.
Classes that need an extra exist without it; using them raises an error that names the extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft.config import ReftConfig
    from reft.interop.models import load_adapters_reft, load_pyreft, save_pyreft
    from reft.model.reft_model import ReftModel, get_reft_model
    from reft.train.collate import ReftDataCollator
    from reft.train.trainer import ReftTrainer
    from reft.train.trl import ReftDPOTrainer, ReftKTOTrainer, ReftSFTTrainer
    from reft.train.trl_grpo import ReftGRPOTrainer

__version__ = "0.1.0"

#: Public name -> the module that defines it.
_HOMES = {
    "ReftConfig": "reft.config",
    "ReftDPOTrainer": "reft.train.trl",
    "ReftDataCollator": "reft.train.collate",
    "ReftGRPOTrainer": "reft.train.trl_grpo",
    "ReftKTOTrainer": "reft.train.trl",
    "ReftModel": "reft.model.reft_model",
    "ReftSFTTrainer": "reft.train.trl",
    "ReftTrainer": "reft.train.trainer",
    "get_reft_model": "reft.model.reft_model",
    "load_adapters_reft": "reft.interop.models",
    "load_pyreft": "reft.interop.models",
    "save_pyreft": "reft.interop.models",
}

#: Modules that need an extra. Without it, their classes are replaced by stand-ins.
_EXTRAS = frozenset({"reft.train.trl", "reft.train.trl_grpo"})

__all__ = [
    "ReftConfig",
    "ReftDPOTrainer",
    "ReftDataCollator",
    "ReftGRPOTrainer",
    "ReftKTOTrainer",
    "ReftModel",
    "ReftSFTTrainer",
    "ReftTrainer",
    "__version__",
    "get_reft_model",
    "load_adapters_reft",
    "load_pyreft",
    "save_pyreft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        if home not in _EXTRAS:
            raise
        # Not cached, so that the class works once the extra is installed.
        return importlib.import_module("reft.absent").stand_in(name, home, str(error))
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
