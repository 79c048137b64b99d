"""The two kinds of adapters that a name stands for in a forward."""

from __future__ import annotations

from reft.adapter.host_adapter import HostAdapter
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters

#: Parameters on the model, or an adapter of the pool.
AdapterSource = AdapterParameters | MultiDeviceParameters | HostAdapter
