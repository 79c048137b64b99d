"""An adapter for inference in host memory: the weights of its edits, identified by a hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reft.adapter.edit_weights import LayerWeights, num_bytes
from reft.adapter.parameters import AdapterParameters
from reft.adapter.tensor_checks import MODULES_PREFIX, check_adapter_tensors, stack_shape
from reft.config import ReftConfig
from reft.io.adapter_files import read_adapter
from reft.positions import Positions

#: Fields of a configuration that do not affect what a trained adapter computes.
_WITHOUT_EFFECT = frozenset(
    {"base_model_name_or_path", "init", "dropout", "dropout_on", "block_path"}
)


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter of a pool or of an engine.

    Attributes:
        config: its configuration.
        layers: the numbers of the blocks that it edits.
        weights: of each of these blocks, in float32 or wider, on the CPU.
        content_hash: SHA-256, in hexadecimal, of everything that its edits depend on. Adapters that
            differ in one bit have different hashes, whatever their names.
    """

    config: ReftConfig
    layers: tuple[int, ...]
    weights: LayerWeights
    content_hash: str

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
        """Bytes in host memory."""
        return sum(map(num_bytes, self.weights))


@torch.no_grad()
def host_adapter(
    config: ReftConfig, tensors: Mapping[str, Tensor], *, num_layers: int, dim: int
) -> HostAdapter:
    """Compute the weights of an adapter from the tensors of its file.

    Args:
        config: its configuration.
        tensors: ``rotation``, ``weight`` and ``bias`` on the CPU, named as
            :meth:`AdapterParameters.export_state_dict` names them.
        num_layers: blocks of the model.
        dim: D, the width of its residual stream.

    Raises:
        ValueError: modules that are trained in full, a layer that the model does not have, a wrong
            shape, rows that must be orthonormal and are not, a value that is not finite.
    """
    if config.modules_to_save or any(name.startswith(MODULES_PREFIX) for name in tensors):
        raise ValueError(
            "an adapter of a pool or an engine must be edits alone; this one has "
            f"modules_to_save = {config.modules_to_save!r}: load it with load_adapter"
        )
    layers = config.resolve_layers(num_layers)
    check_adapter_tensors(config, stack_shape(config, len(layers), dim), tensors)
    adapter = AdapterParameters(config, layers, dim, device="meta")
    adapter = adapter.to_empty(device="cpu").requires_grad_(False).eval()
    exported = {k: v for k, v in tensors.items() if not k.startswith("rotation.")}
    adapter.load(exported)
    content_hash = hash_content(config, layers, exported)
    return HostAdapter(config, layers, adapter.edit_weights(), content_hash)


def read_host_adapter(path: str | os.PathLike[str], *, num_layers: int, dim: int) -> HostAdapter:
    """Read an adapter from a folder; see :func:`host_adapter`.

    Raises:
        OSError: no such folder, or no adapter in it.
        ValueError: a damaged file, or as :func:`host_adapter`, with the path.
    """
    config, tensors = read_adapter(path)
    try:
        return host_adapter(config, tensors, num_layers=num_layers, dim=dim)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def hash_content(config: ReftConfig, layers: tuple[int, ...], tensors: Mapping[str, Tensor]) -> str:
    """Compute SHA-256, in hexadecimal, of an adapter's layers, switches and values."""
    digest = hashlib.sha256()
    values = config.to_dict()
    ignored = {*_WITHOUT_EFFECT, "layers"}
    switches = {f.name: values[f.name] for f in fields(config) if f.name not in ignored}
    digest.update(repr((layers, sorted(switches.items()))).encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
