"""A whole data path in one process: expert servers and a router on loopback, with a placement table by hand."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from experts.config import ExpertServerConfig
from experts.service import ExpertServer
from protos.checkpoint import read_model
from protos.model import ModelSpec
from router.config import RouterConfig
from router.service import RouterServer
from router.table import CopyShare, PlacementTable, ServerAddress

CopyKey = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class Mesh:
    spec: ModelSpec
    router: RouterServer
    servers: dict[str, ExpertServer] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    epoch: int = 0

    def publish(self, copies: Mapping[CopyKey, Iterable[str]] | None = None) -> PlacementTable:
        """Give the router a table: the copies given (key -> server ids), else all that the servers hold."""
        if copies is None:
            held: dict[CopyKey, list[str]] = {}
            for server_id, server in self.servers.items():
                for key in server.report().copies:
                    held.setdefault(key, []).append(server_id)
            copies = held
        self.epoch += 1
        table = PlacementTable(
            epoch=self.epoch,
            servers=tuple(
                ServerAddress(server_id=server_id, address=server.address)
                for server_id, server in sorted(self.servers.items())
            ),
            copies={
                key: tuple(CopyShare(server_id=server_id, share=1.0) for server_id in sorted(server_ids))
                for key, server_ids in copies.items()
            },
            num_experts=self.spec.num_experts,
        )
        self.router.update(table)
        return table

    def add(self, server_id: str, copies: Iterable[CopyKey], config: ExpertServerConfig | None = None) -> ExpertServer:
        server = ExpertServer(self.spec, config or ExpertServerConfig(), server_id=server_id)
        server.load(list(copies))
        server.start("127.0.0.1")
        self.servers[server_id] = server
        return server


def split_copies(spec: ModelSpec, num_servers: int) -> list[list[CopyKey]]:
    """Every expert once, dealt round robin."""
    keys = [(layer, expert) for layer in spec.layers for expert in range(spec.num_experts)]
    return [keys[i::num_servers] for i in range(num_servers)]


@contextmanager
def mesh(
    model: Path,
    placement: Mapping[str, Iterable[CopyKey]] | int = 2,
    *,
    router: RouterConfig | None = None,
    experts: ExpertServerConfig | None = None,
) -> Iterator[Mesh]:
    """Serve `model` with the given copies per server, or dealt over that many servers; checks that nothing is left."""
    spec = read_model(model)
    lost: list[tuple[str, str]] = []
    front = RouterServer(
        spec,
        router or RouterConfig(),
        on_server_lost=lambda server_id, reason: lost.append((server_id, reason)),
        weight_dtype=experts.weight_dtype if experts is not None else "compute",
    )
    front.start("127.0.0.1")
    built = Mesh(spec=spec, router=front, lost=lost)
    if isinstance(placement, int):
        placement = {f"s{i}": copies for i, copies in enumerate(split_copies(spec, placement))}
    try:
        for server_id, copies in placement.items():
            built.add(server_id, copies, experts)
        built.publish()
        yield built
        for server in built.servers.values():
            assert server.report().queue_tokens == 0, "work was left in a server's queue"
        assert front.report().queued_tokens == 0, "requests were left in the router's queue"
    finally:
        front.stop(grace_s=1)
        for server in built.servers.values():
            server.stop(grace_s=1)
