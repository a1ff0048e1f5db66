"""Serve's stock autoscaling for our expert servers, to compare ours with: the same formula on what it would count.

Serve's default policy (ray.serve.autoscaling_policy.replica_queue_length_autoscaling_policy, 2.60) wants
`target_ongoing_requests` requests running or queued per replica. It counts those that came through Serve's handles.
Ours do not (tokens go straight to the servers' gRPC ports), so this policy hands the very same function what Serve
would count if they did: every request that a router has accepted and not answered yet is one call to each server, as
expert parallelism has it. Routers report their open tokens to the placement; this policy reads them from the cluster's
status. Delays, bounds and scaling factors are Serve's own and applied by Serve. Everything else, the placement of
experts included, is the product's.
"""

import json
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster import app

LOOK_S = 0.25


class StockPolicy:
    """Serve's default policy on the calls that are open.

    Args:
        status_url: of the cluster.
        tokens_per_request: of the load.
    """

    def __init__(self, *, status_url: str, tokens_per_request: int) -> None:
        self._status_url, self._tokens_per_request = status_url, tokens_per_request
        self._open_requests = 0.0
        threading.Thread(target=_look_while_it_lives, args=(weakref.ref(self),), daemon=True).start()

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Serve's contract: context in, (replicas, policy state) out."""
        facts: Any = SimpleNamespace(
            config=ctx.config,
            current_num_replicas=ctx.current_num_replicas,
            target_num_replicas=ctx.target_num_replicas,
            policy_state=ctx.policy_state,
            total_num_requests=self._open_requests * ctx.current_num_replicas,
        )
        return replica_queue_length_autoscaling_policy(facts)

    def look(self) -> None:
        """Count the open requests; the last number stays where the cluster is not up yet, or not any more."""
        with suppress(OSError, HTTPException, ValueError, KeyError):
            with urllib.request.urlopen(self._status_url, timeout=2) as answer:
                routers = json.load(answer)["routers"]
            self._open_requests = sum(router["queued_tokens"] for router in routers) / self._tokens_per_request


def _look_while_it_lives(found: "weakref.ref[StockPolicy]") -> None:
    """In a thread of Serve's controller, which must not wait."""
    while (policy := found()) is not None:
        policy.look()
        del policy
        time.sleep(LOOK_S)


@contextmanager
def stock_autoscaling(*, status_url: str, tokens_per_request: int, **timing: Any) -> Iterator[None]:
    """Clusters deployed meanwhile by this process scale by Serve's stock formula; bounds stay those of their config.

    Args:
        status_url, tokens_per_request: see StockPolicy.
        timing: fields of Serve's AutoscalingConfig; what is absent has Serve's default.
    """
    ours = app._autoscaling
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="benchmarks.elasticity_stock:StockPolicy",
        policy_kwargs={"status_url": status_url, "tokens_per_request": tokens_per_request},
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
