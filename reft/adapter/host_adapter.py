"""An adapter in host memory: what an edit needs of it and no more, named by its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reft.adapter.edit_weights import LayerWeights, num_bytes
from reft.adapter.parameters import AdapterParameters
from reft.adapter.tensor_checks import HEADS, bank_shape, check_adapter_tensors
from reft.config import ReftConfig
from reft.io.adapter_files import read_adapter
from reft.positions import Positions

#: Fields of a configuration that change nothing about what is computed once an adapter is trained.
_IDLE = frozenset({"base_model_name_or_path", "init", "dropout", "dropout_on", "block_path"})


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter as it is served.

    Attributes:
        config: what it is.
        layers: the numbers of the blocks it edits.
        weights: A, b and R of each of these, float32 (or wider) on the CPU.
        content: hexadecimal SHA-256 of all that its edits depend on; two adapters that differ in a
            bit have different ones, whatever their names.
    """

    config: ReftConfig
    layers: tuple[int, ...]
    weights: LayerWeights
    content: str

    @property
    def positions(self) -> Positions:
        """The parsed positions of the configuration."""
        return self.config.parsed_positions

    @property
    def sites(self) -> tuple[tuple[int, str], ...]:
        """(block number, component) of each layer: the outputs that are edited."""
        return tuple((layer, self.config.component) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies here."""
        return sum(map(num_bytes, self.weights))


@torch.no_grad()
def stored(
    config: ReftConfig, tensors: Mapping[str, Tensor], *, num_layers: int, dim: int
) -> HostAdapter:
    """The adapter of a configuration and of the tensors that it is saved as.

    Args:
        config: what it is.
        tensors: ``rotation``, ``weight`` and ``bias`` on the CPU, named as
            :meth:`AdapterParameters.export_state_dict` names them.
        num_layers: blocks of the model.
        dim: D, the width of its residual stream.

    Raises:
        ValueError: heads, a layer that the model has not, a wrong shape, rows that are not
            orthonormal where they must be, a value that is not finite.
    """
    if config.modules_to_save or any(name.startswith(HEADS) for name in tensors):
        raise ValueError(
            "an adapter that is served beside others must be edits alone; this one has "
            f"modules_to_save = {config.modules_to_save!r}: load it with load_adapter"
        )
    layers = config.resolve_layers(num_layers)
    check_adapter_tensors(config, bank_shape(config, len(layers), dim), tensors)
    adapter = AdapterParameters(config, layers, dim, device="meta")
    adapter = adapter.to_empty(device="cpu").requires_grad_(False).eval()
    published = {k: v for k, v in tensors.items() if not k.startswith("rotation.")}
    adapter.load(published)
    return HostAdapter(
        config, layers, adapter.edit_weights(), content_of(config, layers, published)
    )


def read_host_adapter(path: str | os.PathLike[str], *, num_layers: int, dim: int) -> HostAdapter:
    """The adapter in a folder; see :func:`stored`.

    Raises:
        OSError: no such folder, or no adapter in it.
        ValueError: a damaged file, or as :func:`stored`, with the path.
    """
    config, tensors = read_adapter(path)
    try:
        return stored(config, tensors, num_layers=num_layers, dim=dim)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def content_of(config: ReftConfig, layers: tuple[int, ...], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of the layers, the switches and the values of an adapter."""
    digest = hashlib.sha256()
    values = config.to_dict()
    chosen = {f.name: values[f.name] for f in fields(config) if f.name not in (*_IDLE, "layers")}
    digest.update(repr((layers, sorted(chosen.items()))).encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
