"""Whom a request counts for, and the bounds that hold for each: settings and adapters on one side, the engine's limits on the other."""

from jaxlora.adapters import AdapterVersion
from jaxlora.engine import Account, Bounds, Limits
from jaxlora.settings import Settings


def account_of(adapter: AdapterVersion | None) -> Account:
    """The account of an adapter, the same for all its versions; of the base model for None."""
    return Account() if adapter is None else Account(adapter.name.unpinned, adapter.name.user)


def limits_of(settings: Settings) -> Limits:
    """The engine's limits as the settings say."""
    return Limits(
        max_queue=settings.max_queue,
        queue_timeout_s=settings.queue_timeout_s,
        reserved_slots=settings.reserved_slots,
        burst_s=settings.rate_burst_s,
        prefix_cache=bool(settings.prefix_cache),
        adapter=Bounds(settings.max_running_per_adapter, settings.max_queue_per_adapter, settings.tokens_per_s_per_adapter),
        user=Bounds(settings.max_running_per_user, settings.max_queue_per_user, settings.tokens_per_s_per_user),
    )
