"""Serve's stock autoscaling for our expert servers, to compare ours with: the same formula, fed with the same facts.

Serve's default policy (ray.serve.autoscaling_policy.replica_queue_length_autoscaling_policy, 2.60) wants
`target_ongoing_requests` requests running or queued per replica. It counts those that came through Serve's handles.
Ours do not (tokens go straight to the servers' gRPC ports), so this policy hands the very same function the calls that
run or wait at the servers: their backlog in seconds, as they report it to our policy, times the rate they are paced to,
over the routed pairs of a call. Delays, bounds and scaling factors are Serve's own and applied by Serve. Everything
else, the placement of experts included, is the product's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster import app
from cluster.scaling import BACKLOG


class StockPolicy:
    """Serve's default policy on the servers' own queues.

    Args:
        pairs_per_s: what one server computes.
        pairs_per_call: routed pairs of one call to one server.
    """

    def __init__(self, *, pairs_per_s: float, pairs_per_call: float) -> None:
        self._calls_per_backlog_s = pairs_per_s / pairs_per_call

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Serve's contract: context in, (replicas, policy state) out."""
        backlog_s = sum((ctx.aggregated_metrics or {}).get(BACKLOG, {}).values())
        facts: Any = SimpleNamespace(
            config=ctx.config,
            current_num_replicas=ctx.current_num_replicas,
            target_num_replicas=ctx.target_num_replicas,
            policy_state=ctx.policy_state,
            total_num_requests=backlog_s * self._calls_per_backlog_s,
        )
        return replica_queue_length_autoscaling_policy(facts)


@contextmanager
def stock_autoscaling(*, pairs_per_s: float, pairs_per_call: float, **timing: Any) -> Iterator[None]:
    """Clusters deployed meanwhile by this process scale by Serve's stock formula; bounds stay those of their config.

    Args:
        pairs_per_s, pairs_per_call: see StockPolicy.
        timing: fields of Serve's AutoscalingConfig; what is absent has Serve's default.
    """
    ours = app._autoscaling
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="benchmarks.elasticity_stock:StockPolicy",
        policy_kwargs={"pairs_per_s": pairs_per_s, "pairs_per_call": pairs_per_call},
    )

    def stock(*args: Any) -> AutoscalingConfig:
        bounds = ours(*args)
        return AutoscalingConfig(
            min_replicas=bounds.min_replicas,
            initial_replicas=bounds.initial_replicas,
            max_replicas=bounds.max_replicas,
            policy=policy,
            **timing,
        )

    with mock.patch.object(app, "_autoscaling", stock):
        yield
