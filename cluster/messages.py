"""What servers and routers tell the placement, and what it answers. They travel over Serve handles, pickled."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Key = tuple[str, int]  # (layer, expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHello:
    """What an expert server says about itself when it registers."""

    server_id: str  # unique per process
    address: str  # gRPC host:port
    node: str
    pid: int
    max_copies: int  # what fits into its byte budget
    pool: str = "default"
    speed: float = 1.0  # relative to the other servers of its pool
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a server is to hold.

    Args:
        copies: most urgent first.
        released: no router can still use the server, it may stop.
        sources: addresses of servers that hold a copy this one still has to load; absent: only the checkpoint does. No
            part of equality: a holder that comes or goes changes nothing of what is to be held.
    """

    version: int
    copies: tuple[Key, ...]
    released: bool = False
    sources: Mapping[Key, tuple[str, ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBeat:
    """An expert server's heartbeat.

    Args:
        held: copies loaded and warm.
        applied_version: assignment version whose unloads are done.
        seq: grows with every message of this server, so that a late one is recognised.
        failed: copies asked for that could not be loaded, with the reason.
        loaded: what came from where since the server started: source ("page_cache", "peer", "storage") -> "copies",
            "bytes", "seconds", "failures" (attempts after which another source was taken).
    """

    server_id: str
    held: frozenset[Key]
    applied_version: int
    seq: int
    failed: Mapping[Key, str]
    bytes: int
    budget_bytes: int
    queue_tokens: int  # routed pairs waiting or running
    busy_share: float  # of the last second
    pairs_per_s: float  # computed, over the last second
    capacity_pairs_per_s: float  # what it would compute if it were always busy; 0: not known yet
    loaded: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReply:
    """The placement's answer to a heartbeat."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBeat:
    """A router's heartbeat: the epochs it uses (its acknowledgement), its demand, its account."""

    router_id: str
    address: str
    node: str
    pid: int
    epoch: int
    oldest_epoch: int
    known_servers: frozenset[str]  # of its table
    demand: Mapping[Key, int]  # routed pairs its gates asked for, since it started
    totals: Mapping[str, float]  # ledger sums since it started, and the trace's tokens
    p50_s: float
    p99_s: float
    tokens_per_s: float
    queued_tokens: int  # accepted and not yet answered
