"""Watching a running cluster from outside: its status, its nodes, and which servers compute which copies.

"Takes traffic" is read from the servers themselves: the counter of routed pairs a copy has computed.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc.aio
import ray

from cluster import app
from cluster.demo_timeline import Key, ServerLine
from protos import expert_pb2
from protos.services import CHANNEL_OPTIONS, status_method

_PROBE_TIMEOUT_S = 0.5


class Watcher:
    """Looks at the cluster `name`; use on one event loop. `status` keeps the last document the placement gave."""

    def __init__(self, name: str) -> None:
        self.status: dict[str, Any] = {}
        self.nodes = 0
        self._name = name
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._copies: dict[Key, int] = {}

    async def look(self) -> None:
        """Ask the placement and Ray; a placement that does not answer in time leaves the last document."""
        found, nodes = await asyncio.gather(
            asyncio.wait_for(app.status(self._name), 3.0), asyncio.to_thread(ray.nodes), return_exceptions=True
        )
        if not isinstance(found, BaseException):
            self.status = found
            self._copies |= {(entry["layer"], entry["expert"]): entry["copies"] for entry in found["experts"]}
            self._copies |= dict.fromkeys(map(_key, found["single_copy_experts"]), 1)
            self._copies |= dict.fromkeys(map(_key, found["missing_experts"]), 0)
        if not isinstance(nodes, BaseException):
            # Experts live on nodes with a (fake) GPU; the head has none.
            self.nodes = sum(bool(node["Alive"] and node["Resources"].get("GPU")) for node in nodes)

    @property
    def servers(self) -> tuple[ServerLine, ...]:
        """The expert servers of the last document."""
        return tuple(
            ServerLine(
                server_id=server["id"],
                node=server["node"],
                pid=server["pid"],
                state=server["state"],
                copies=server["copies"],
                queue_tokens=server["queue_tokens"],
                busy=server["busy"],
            )
            for server in self.status.get("servers", ())
        )

    def copies(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Live copies of these experts; one the document does not list has what it had when it last did."""
        return {key: self._copies.get(key, 0) for key in keys}

    async def computed(self) -> dict[str, dict[Key, int]]:
        """Pairs computed so far, per server and copy, from the servers that answer."""
        addresses = {server["id"]: server["grpc"] for server in self.status.get("servers", ())}
        answers = await asyncio.gather(*(self._ask(address) for address in addresses.values()))
        return {
            server_id: {(copy.layer, copy.expert): copy.tokens for copy in answer.copies}
            for server_id, answer in zip(addresses, answers, strict=True)
            if answer is not None
        }

    async def close(self) -> None:
        """Close the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _ask(self, address: str) -> expert_pb2.StatusResponse | None:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        try:
            return await status_method(channel)(expert_pb2.StatusRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None


def _key(pair: list[Any]) -> Key:
    return str(pair[0]), int(pair[1])
