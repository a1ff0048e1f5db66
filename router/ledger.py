"""The account of every request: what happened to each of its T*K routed pairs, and how long it took."""

from dataclasses import dataclass, fields

from protos import router_pb2


@dataclass(slots=True, kw_only=True)
class RequestLedger:
    """The counts of protos/router.proto's Ledger: pairs = computed + dropped; copied, waited, rerouted are computed."""

    pairs: int = 0
    computed: int = 0
    copied: int = 0
    waited: int = 0
    rerouted: int = 0
    dropped: int = 0
    retried: int = 0
    dropped_gate_mass: float = 0.0
    epoch: int = 0
    batch_tokens: int = 0
    num_servers: int = 0
    queue_s: float = 0.0
    gate_s: float = 0.0
    experts_s: float = 0.0
    total_s: float = 0.0

    def take(self, counts: object) -> None:
        """Overwrite the counts of pairs with those of a `capacity.Tally`."""
        for name in _TALLIED:
            setattr(self, name, getattr(counts, name))

    def to_proto(self) -> router_pb2.Ledger:
        return router_pb2.Ledger(**{name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_proto(cls, proto: router_pb2.Ledger) -> "RequestLedger":
        return cls(**{name: getattr(proto, name) for name in _NAMES})


@dataclass(slots=True, kw_only=True)
class LedgerTotals:
    """Sums over all requests a router (or a load generator) has seen. Pairs, except requests and tokens."""

    requests: int = 0
    failed_requests: int = 0
    tokens: int = 0
    pairs: int = 0
    computed: int = 0
    copied: int = 0
    waited: int = 0
    rerouted: int = 0
    dropped: int = 0
    retried: int = 0
    dropped_gate_mass: float = 0.0

    def add(self, ledger: RequestLedger, *, num_tokens: int) -> None:
        """Count an answered request."""
        self.requests += 1
        self.tokens += num_tokens
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(ledger, name))


_NAMES = tuple(field.name for field in fields(RequestLedger))
_TALLIED = ("pairs", "computed", "copied", "waited", "rerouted", "dropped", "dropped_gate_mass")
_COUNTS = ("pairs", "computed", "copied", "waited", "rerouted", "dropped", "retried", "dropped_gate_mass")
