"""Writing folders that pyreft 0.1.0 reads.

pyreft does not store positions, activation, dropout and dtype. Its ``ReftModel.load`` converts W
and b to bfloat16 and always makes the activation linear. It cannot load the two members with a free
R, because it requires an ``add_bias`` that its configuration cannot hold; ``load_state_dict`` of
their classes reads the files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reft.config import COMPONENTS, ReftConfig
from reft.interop.from_pyreft import FIELDS, HEADS_FILE
from reft_kernels import FAMILY
from reft_kernels.spec import EditSpec


def write_pyreft(
    path: str | os.PathLike[str],
    config: ReftConfig,
    layers: Sequence[int],
    tensors: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
) -> None:
    """Write an adapter like pyreft's ``save(path, include_model=True)``, in one atomic step.

    Args:
        path: a new or empty folder.
        config: configuration of the adapter.
        layers: numbers of its blocks, not negative.
        tensors: ``rotation``, ``weight`` and ``bias`` of ``export_state_dict``.
        heads: trained parameters of the base model, by their name in it.

    Raises:
        OSError: the folder is a file, is not empty, or cannot be written.
        ValueError: pyreft's format cannot hold the adapter.
    """
    folder = Path(path)
    if config.component not in COMPONENTS:
        raise ValueError(
            f"component must be one that pyreft loads by name ({', '.join(COMPONENTS)}), got "
            f"{config.component!r}"
        )
    for field, value, default in (
        ("untied_by", config.untied_by, "side"),
        ("subspaces", config.subspaces, None),
    ):
        if value != default:
            raise ValueError(
                f"{field} must be {default!r}, because pyreft has no such setting; got {value!r}"
            )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "pyreft stores a folder, but this is a file", str(folder)
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "pyreft's files are written to a new or empty folder only", str(folder)
        )
    rotation = tensors["rotation"]
    groups, rank, dim = rotation.shape[1:]
    # All layers of group 0 first: pyreft applies the first half to the first tokens.
    locations = [(at, layer, group) for group in range(groups) for at, layer in enumerate(layers)]
    keys = [
        f"layer_{layer}_comp_{config.component}_unit_pos_nunit_1#{group}"
        for _, layer, group in locations
    ]
    representation = {"component": config.component, "unit": "pos", "max_number_of_units": 1}
    count = len(locations)
    described = {
        "intervention_constant_sources": [True] * count,
        "intervention_dimensions": [dim] * count,
        "intervention_types": [f"<class 'pyreft.interventions.{config.spec.pyreft}'>"] * count,
        "mode": "parallel",
        "representations": [
            [
                {**representation, "layer": layer, "low_rank_dimension": rank}.get(field)
                for field in FIELDS
            ]
            for _, layer, _ in locations
        ],
        "sorted_keys": keys,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir()
        for key, (at, _, group) in zip(keys, locations, strict=True):
            unit = {name: stacked[at, group].cpu() for name, stacked in tensors.items()}
            _save(beside / f"intkey_{key}.bin", _state(config.spec, unit))
        _save(beside / HEADS_FILE, heads)
        text = json.dumps(described, indent=2) + "\n"
        (beside / "config.json").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.replace(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _state(spec: EditSpec, unit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Build the ``state_dict`` of pyreft's class."""
    rotation, bias, weight = unit["rotation"], unit["bias"], unit.get("weight")
    if spec is FAMILY["loreft"]:
        # This class overrides state_dict.
        assert weight is not None
        return {"weight": weight, "bias": bias, "rotate_layer": rotation.mT.float()}
    dim = rotation.shape[1]
    state = {name: torch.tensor(dim) for name in ("embed_dim", "interchange_dim")}
    if spec.orthonormal:
        parametrised = "rotate_layer.parametrizations.weight."
        state[f"{parametrised}original"] = -torch.eye(dim, rotation.shape[0])
        state[f"{parametrised}0.base"] = completed(rotation).float()
    else:
        state["proj_layer.weight"] = rotation
    if weight is None:
        return {**state, "learned_source": bias}
    return {**state, "learned_source.weight": weight, "learned_source.bias": bias}


def completed(rotation: Tensor) -> Tensor:
    """Complete R (r, D) to an orthonormal (D, D) matrix whose first r columns are Rᵀ.

    pyreft's parametrization trains in the span of the other columns too, so they cannot be zero.
    """
    columns = rotation.mT.double()
    packed, tau = torch.geqrf(columns)
    base = torch.ormqr(packed, tau, torch.eye(columns.shape[0], dtype=columns.dtype))
    base[:, : columns.shape[1]] = columns
    return base


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, because torch writes the whole storage of a view.
    copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    with file.open("wb") as stream:
        torch.save(copies, stream)
        stream.flush()
        os.fsync(stream.fileno())
