"""The adapter store: names, layout, versions, publishing, the catalogue, and the tiers disk -> host -> device. Imports no JAX."""

from jaxlora.adapters.catalogue import AdapterVersion, Catalogue, CatalogueReader, catalogue_path
from jaxlora.adapters.device_slots import Acquired, DeviceSlots
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.names import AdapterName
from jaxlora.adapters.policy import write_policy
from jaxlora.adapters.publish import publish
from jaxlora.adapters.refresh import Report, refresh
from jaxlora.adapters.store import Store

__all__ = [
    "Acquired",
    "AdapterName",
    "AdapterVersion",
    "Catalogue",
    "CatalogueReader",
    "DeviceSlots",
    "HostCache",
    "Report",
    "Store",
    "catalogue_path",
    "publish",
    "refresh",
    "write_policy",
]
