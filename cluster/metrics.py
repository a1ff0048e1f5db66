"""The placement's numbers for Prometheus, through Ray's own exporter (every node's metrics endpoint).

Names start with `expertmesh_`; Ray puts `ray_` in front. Series per expert exist for the hottest ones only: a model has
tens of thousands of experts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.load import Forecast

_SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class Metrics:
    """All series of one placement.

    Args:
        name: of the cluster, a tag of every series.
    """

    def __init__(self, name: str) -> None:
        self._name = {"cluster": name}
        self.loads = self._counter("copies_planned", "copies that plans asked servers to load", "reason")
        self.unloads = self._counter("copies_dropped", "copies that plans took away", "reason")
        self.overtaken = self._counter("loads_overtaken", "loads that newer plans took back before they were done")
        self.replacement_s = Histogram(
            "expertmesh_replacement_seconds",
            description="from the plan of a re-placement to its last observed copy",
            boundaries=_SECONDS,
            tag_keys=("cluster",),
        )
        self.replacement_s.set_default_tags(self._name)
        self._epoch = self._gauge("epoch", "epoch of the placement table")
        self._outstanding = self._gauge("copies_outstanding", "copies that are planned and not observed")
        self._single = self._gauge("single_copy_experts", "experts with one live copy")
        self._missing = self._gauge("missing_experts", "experts without a live copy")
        self._at_risk = self._gauge("mass_at_risk", "largest share of the load that a loss to survive would take")
        self._demand = self._gauge("demand_pairs_per_s", "routed pairs per second that the gates ask for")
        self._error = self._gauge("load_forecast_error", "sum of |predicted - actual| over actual, of the last second")
        self._noise = self._gauge("load_forecast_noise", "the error that a perfect forecast would have had")
        self._balance = self._gauge("layer_balancedness", "mean over maximum server load", "layer")
        self._hot = self._gauge("expert_pairs_per_s", "load of the hottest experts", "layer", "expert")
        self._copies = self._gauge("expert_copies", "live copies of the hottest experts", "layer", "expert")
        self._server = {
            field: self._gauge(f"server_{field}", what, "server", "pool")
            for field, what in (
                ("copies", "copies held"),
                ("bytes", "memory of its copies"),
                ("queue_tokens", "routed pairs waiting or running"),
                ("busy", "share of the last second spent computing"),
                ("pairs_per_s", "routed pairs computed per second"),
            )
        }
        self._hottest: set[tuple[str, int]] = set()
        self._servers: set[tuple[str, str]] = set()

    def forecast(self, found: Forecast | None) -> None:
        """How wrong the load estimate was."""
        if found is not None:
            self._error.set(found.error)
            self._noise.set(found.noise)

    def placement(
        self, *, epoch: int, outstanding: int, single: int, missing: int, at_risk: float, demand: float
    ) -> None:
        """The placement as a whole."""
        self._epoch.set(epoch)
        self._outstanding.set(outstanding)
        self._single.set(single)
        self._missing.set(missing)
        self._at_risk.set(at_risk)
        self._demand.set(demand)

    def balance(self, balancedness: Mapping[str, float]) -> None:
        """Balancedness by layer."""
        for layer, value in balancedness.items():
            self._balance.set(value, tags={"layer": layer})

    def experts(self, hottest: Iterable[tuple[str, int, float, int]]) -> None:
        """(layer, expert, pairs per second, copies) of the hottest; those that are not any more go to zero."""
        now: set[tuple[str, int]] = set()
        for layer, expert, rate, copies in hottest:
            tags = {"layer": layer, "expert": str(expert)}
            self._hot.set(rate, tags=tags)
            self._copies.set(copies, tags=tags)
            now.add((layer, expert))
        for layer, expert in self._hottest - now:
            tags = {"layer": layer, "expert": str(expert)}
            self._hot.set(0, tags=tags)
            self._copies.set(0, tags=tags)
        self._hottest = now

    def servers(self, found: Iterable[Mapping[str, Any]]) -> None:
        """The servers of the status document; those that left go to zero."""
        now: set[tuple[str, str]] = set()
        for server in found:
            who = (server["id"], server["pool"])
            now.add(who)
            for field, gauge in self._server.items():
                gauge.set(server[field], tags={"server": who[0], "pool": who[1]})
        for server_id, pool in self._servers - now:
            for gauge in self._server.values():
                gauge.set(0, tags={"server": server_id, "pool": pool})
        self._servers = now

    def _gauge(self, name: str, what: str, *tags: str) -> Gauge:
        gauge = Gauge(f"expertmesh_{name}", description=what, tag_keys=("cluster", *tags))
        gauge.set_default_tags(self._name)
        return gauge

    def _counter(self, name: str, what: str, *tags: str) -> Counter:
        counter = Counter(f"expertmesh_{name}", description=what, tag_keys=("cluster", *tags))
        counter.set_default_tags(self._name)
        return counter
