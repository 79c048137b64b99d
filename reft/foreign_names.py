"""Names that PEFT, pyreft and adapters give configuration fields, and their equivalents here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

from reft.field_checks import did_you_mean

Config = TypeVar("Config", bound=type[Any])
Function = TypeVar("Function", bound=Callable[..., Any])

_ENDS = 'write positions="f7+l7" for the first and last 7 tokens'
_LAYERS = "write layers and component, which say where hidden vectors are edited"
_START = 'write init="pyreft" or "identity"'
_WEIGHTS = "leave it out: an edit adapts hidden vectors and no weight matrix"
_MEMBER = 'write intervention="loreft", or another member of the family'

#: Maximum number of unknown names in a message.
_LISTED = 6

#: A name of PEFT, pyreft or adapters -> advice.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        # PEFT
        "r": "write rank",
        "lora_r": "write rank",
        "lora_alpha": "leave it out: an edit is not scaled (adapter_scales of a call scales it)",
        "alpha": "leave it out: an edit is not scaled (adapter_scales of a call scales it)",
        "lora_dropout": "write dropout",
        "target_modules": _LAYERS,
        "target_parameters": _WEIGHTS,
        "exclude_modules": _LAYERS,
        "layers_to_transform": "write layers",
        "layer_indexes": "write layers",
        "layers_pattern": "write block_path, and only if the blocks are not detected",
        "rank_pattern": "leave it out: every layer has the same rank; add a second adapter",
        "alpha_pattern": "leave it out: an edit is not scaled",
        "use_rslora": "leave it out: an edit is not scaled",
        "use_dora": _WEIGHTS,
        "fan_in_fan_out": _WEIGHTS,
        "bias": "leave it out: every edit has a bias b",
        "lora_bias": "leave it out: every edit has a bias b",
        "init_lora_weights": _START,
        "init_weights": _START,
        "inference_mode": (
            "leave it out: set_adapter(name, inference_mode=True) freezes an adapter, and "
            "from_pretrained without is_trainable=True"
        ),
        "peft_type": _MEMBER,
        "peft_version": "leave it out: format_version is the version of a stored adapter",
        "auto_mapping": "leave it out",
        "revision": "leave it out: from_pretrained takes revision",
        "ensure_weight_tying": "leave it out: modules that share a matrix are trained as one",
        "trainable_token_indices": 'write modules_to_save=["embed_tokens"], for all tokens',
        "num_virtual_tokens": "write positions, which say which tokens of the prompt are edited",
        "adapter_name": "give it to get_reft_model or add_adapter",
        # pyreft
        "representations": (
            "write layers, component and rank in the configuration itself, "
            'as ReftConfig(layers=[15], component="block_output", rank=4)'
        ),
        "low_rank_dimension": "write rank",
        "intervention_type": _MEMBER,
        "intervention_types": _MEMBER,
        "intervention_params": "write rank, activation and so on themselves",
        "interventions": _MEMBER,
        "interventions_dict": _MEMBER,
        "intervention_dimensions": "leave it out: the width is the model's",
        "embed_dim": "leave it out: the width is the model's",
        "layer": "write layers, a list of numbers",
        "position": "write positions",
        "num_interventions": "write layers",
        "share_weights": "write tied",
        "act_fn": "write activation",
        "add_bias": "leave it out: every edit has a bias b",
        "first_n": _ENDS,
        "last_n": _ENDS,
        "mode": "leave it out",
        # adapters
        "prefix_positions": _ENDS,
        "suffix_positions": _ENDS,
        "tied_weights": "write tied",
        "non_linearity": "write activation",
        "orthogonality": "write intervention: loreft has an orthonormal R, noreft has a free R",
        "subtract_projection": "write intervention: loreft subtracts R h, direft does not",
        "leave_out": "write layers without them",
        "reduction_factor": "write rank",
    }
)

#: An argument of PEFT's or pyreft's functions -> advice for ``get_reft_model``.
WRAPPING: Mapping[str, str] = MappingProxyType(
    {
        "model": "write base_model",
        "peft_config": "write config, a reft.ReftConfig",
        "reft_config": "write config",
        "set_device": "leave it out: the adapter is created on the device of the base model",
        "disable_model_grads": "leave it out: the base model is always frozen",
        "mixed": "leave it out: every model supports mixed batches",
        "is_trainable": "leave it out: a new adapter is trained",
        "autocast_adapter_dtype": "write dtype in the ReftConfig",
        "low_cpu_mem_usage": "leave it out",
    }
)


def unknown_fields(names: Iterable[object], known: Iterable[str], shown: Any = repr) -> str | None:
    """Return the message about names that are not known fields; None if all are known."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return None
    advice = []
    for name in unknown[:_LISTED]:
        instead = FOREIGN.get(name) if isinstance(name, str) else None
        near = did_you_mean(str(name), known)
        advice.append(f"{shown(name)}{near if instead is None else f': {instead}'}")
    if len(unknown) > _LISTED:
        advice.append(f"{len(unknown) - _LISTED} others")
    return f"ReftConfig has no field {'; no '.join(advice)}; its fields are {', '.join(known)}"


def refusing_foreign_names(config: Config) -> Config:
    """Make a dataclass answer an unknown keyword with the name of the matching field.

    Raises:
        TypeError: the class is called with a keyword that is not a field.
    """
    initialise = config.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        message = unknown_fields(values, (field.name for field in fields(config)))
        if message is not None:
            raise TypeError(message)
        initialise(self, *args, **values)

    config.__init__ = __init__
    return config


def refusing_foreign_keywords(instead: Mapping[str, str]) -> Callable[[Function], Function]:
    """Make a function answer another library's keyword with the name of the matching argument.

    Raises:
        TypeError: the function is called with one of the keywords.
    """

    def refusing(function: Function) -> Function:
        @functools.wraps(function)
        def called(*args: Any, **values: Any) -> Any:
            advice = [f"{name}: {instead[name]}" for name in values if name in instead]
            if advice:
                signature = f"{function.__name__}{inspect.signature(function)}"
                raise TypeError(f"{function.__name__} takes no {'; no '.join(advice)}; {signature}")
            return function(*args, **values)

        return called  # type: ignore[return-value]

    return refusing
