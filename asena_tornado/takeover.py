"""One site after another, as when a notebook cell is run again: the clients stay, the code is new.

The new site starts beside the old one, behind the same door; if that fails, the old one stays as it was. The switch
itself waits for nothing. After it, whatever the new site did not take over from the old one is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from .cluster import Cluster
from .hosting import LoopDoor
from .site import PATIENCE, STOP_TIMEOUT, Site, close_sockets
from .websocket.namespace import Namespace
from .websocket.service import bind


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What the new site did not take over from the old one."""

    site: Site
    gone: list[Namespace]
    cluster: Cluster | None


async def take_over(new: Site, old: Site, door: LoopDoor, check: Callable[[], None]) -> Leftovers:
    """Put the new site in the place of the old one, behind the same door.

    ``check`` may raise right before the switch. The clients of namespaces that both have pass over. What is left is
    returned, for `retire`.
    """
    new.build()
    cluster = await _cluster_for(new, old)
    # What the new components send as they start goes to the clients that are taken over.
    assert old.outbox is not None
    for path, fresh in new.namespaces.items():
        namespace = old.namespaces.get(path, fresh)
        namespace.open(door, old.outbox)
        bind(fresh.hooks.service, namespace)
        new.ulak.open(door, [namespace])
    try:
        await new.container.start(running=old.container)
        try:
            check()
        except BaseException:
            await new.container.stop(successor=old.container)
            raise
    except BaseException:
        if cluster is not None and cluster is not old.cluster:
            await cluster.stop()
        raise
    return _switch(new, old, door, cluster)


async def _cluster_for(new: Site, old: Site) -> Cluster | None:
    if old.cluster is not None and old.transport == new.transport:
        new.transport = old.transport
        return old.cluster
    if old.is_alone and new.is_alone:
        new.transport = old.transport  # and with it what rooms remember
    return await new.new_cluster({})


def _switch(new: Site, old: Site, door: LoopDoor, cluster: Cluster | None) -> Leftovers:
    """Switch without waiting for anything, and so between two messages."""
    assert old.outbox is not None
    # Before all else of it ends: the new one's run already.
    old.container.stop_ticking(new.container)
    new.outbox = old.outbox
    new.outbox.ledger.limit = new.max_buffered_bytes
    gone = []
    for path, kept in old.namespaces.items():
        if path in new.namespaces:
            fresh = new.namespaces[path]
            new.namespaces[path] = kept
            kept.replace(fresh.hooks, fresh.options, fresh.rules)
        else:
            gone.append(kept)
            kept.remember(None)
    new.cluster, old_cluster, old.cluster = cluster, old.cluster, None
    if old_cluster is not None and old_cluster is not cluster:
        old_cluster.serve({})
    if cluster is not None:
        cluster.on_gap = new.on_gap
        cluster.serve(new.namespaces)
    new.open_namespaces(door)
    for path, endpoint in old.endpoints.items():
        endpoint.successor = new.endpoints.get(path)
        endpoint.closing = endpoint.closing or endpoint.successor is None
    return Leftovers(old, gone, None if old_cluster is cluster else old_cluster)


async def retire(leftovers: Leftovers, successor: Site) -> None:
    """End what is left of the old site: namespaces without a successor (closed with 1012), components."""
    old = leftovers.site
    deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT
    await close_sockets(leftovers.gone, deadline, PATIENCE, 1012, "this namespace no longer exists")
    await old.controllers.drain(deadline)
    if leftovers.cluster is not None:
        await leftovers.cluster.stop()
    await old.container.stop(successor=successor.container, until=deadline)
    old.ulak.close("this server was replaced by a newer one, as when a cell is run again: use the newer one's")
    old.namespaces, old.endpoints, old.outbox = {}, {}, None


__all__ = ["Leftovers", "retire", "take_over"]
