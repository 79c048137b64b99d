"""What the name of an adapter stands for in a forward."""

from __future__ import annotations

from reft.adapter.device_cache import EditSite
from reft.adapter.host_adapter import HostAdapter
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters

#: Parameters on the model, or an adapter of the pool.
AdapterSource = AdapterParameters | MultiDeviceParameters | HostAdapter


def edit_sites(source: AdapterSource) -> tuple[EditSite, ...]:
    """The block outputs, or outputs of their parts, that an adapter edits."""
    component = source.config.component
    return tuple((layer, component) for layer in source.layers)
