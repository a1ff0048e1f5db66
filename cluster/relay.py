"""How many servers the placement wants, carried to Serve by the policies that its controller asks ten times a second.

The placement decides (it knows demand, capacity and memory, and can say why), Serve carries it out. The way there has
to work for a pool without a single replica, so it does not lead over the pool's own: the placement's replica reports
the numbers as its `record_autoscaling_stats`; `PublishTargets`, the policy of the placement's deployment, puts them
where `FollowTarget`, the policy of every pool's deployment, finds them in the same process. Bounds are Serve's own.

Serve pickles this module by value into its controller, so it imports the standard library alone, and keeps the board
in a module of `sys.modules` that all copies of this one share. An exception here would stall every application, so it
becomes "no change"; without news from the placement nothing changes either.
"""

import logging
import sys
import types
from collections.abc import Mapping
from typing import Any

AT_LEAST, AT_MOST = "at_least/", "at_most/"  # and the pool's name

_BOARD = "expertmesh_scaling_board"


class PublishTargets:
    """Policy of the placement's deployment: takes the numbers its replica reports, and leaves its own count alone."""

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's contract (ray.serve.autoscaling_policy, 2.60): context in, (replicas, policy state) out."""
        try:
            numbers: dict[str, float] = {}
            for name, by_replica in (ctx.raw_metrics or {}).items():
                if name.startswith((AT_LEAST, AT_MOST)):
                    readings = [reading for series in by_replica.values() for reading in series]
                    if readings:
                        numbers[name] = max(readings, key=lambda reading: reading.timestamp).value
            _board()[ctx.app_name] = numbers
        except Exception:
            logging.getLogger("ray.serve").exception("the numbers of expert servers cannot be read")
        return ctx.target_num_replicas, {}


class FollowTarget:
    """Policy of a pool's deployment: as many replicas as the placement wants."""

    def __init__(self, *, pool: str) -> None:
        self._pool = pool

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's contract: context in, (replicas, policy state) out."""
        target: int = ctx.target_num_replicas
        try:
            numbers = _board().get(ctx.app_name, {})
            at_least = numbers.get(AT_LEAST + self._pool, target)
            at_most = numbers.get(AT_MOST + self._pool, max(target, at_least))
            return int(max(at_least, min(target, at_most))), {}
        except Exception:
            logging.getLogger("ray.serve").exception("expert servers of pool %s: keeping %s", self._pool, target)
            return target, {}


def _board() -> dict[str, Mapping[str, float]]:
    """By application: what the placement wants, shared by all policies of this process."""
    shared = sys.modules.setdefault(_BOARD, types.ModuleType(_BOARD))
    board: dict[str, Mapping[str, float]] = shared.__dict__.setdefault("numbers", {})
    return board
