"""The planner beside EPLB and a linear placement: balance, bytes, moves, survival, time.

    python -m benchmarks.planner [--seeds N] [--repeats N] [--limit-s S] [--out FILE]

Loads are those of `benchmarks.load_matrices`; nothing is served. A placement is judged by

    balancedness   mean over maximum server load (per speed) of a layer, each copy carrying its share
    extra          bytes beyond one copy of every expert; for EPLB its slots, two of one expert on one server included
    moved          copies loaded somewhere by the re-plan, in percent of the copies before; relabelled: if the servers
                   of each layer could be renamed for nothing, as EPLB's GPUs can
    survival       gate mass (share of all load) without a live copy after the loss of a server

The arms are in `benchmarks.planner_arms`: a new planner joins with one line there. Times are CPU seconds of this
process, medians; a plan that takes longer than the limit is reported as such and what it would have reached as unknown.
"""

import argparse
import gc
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from benchmarks import load_matrices
from benchmarks.document import publish
from benchmarks.load_matrices import Load
from benchmarks.placements import (
    Row,
    balance,
    balancedness,
    least_lost_percent,
    moved_percent,
    relabelled,
    survival,
)
from benchmarks.planner_arms import Arm, arms, make_servers, unequal_servers


class TookTooLong(Exception):
    """The plan used more CPU time than the limit."""


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def merged(rows: list[Row]) -> Row:
    """Several seeds as one row: the worst of minima and maxima, the mean of the rest."""
    picks: dict[str, Callable[[list[float]], float]] = {"min": min, "server": max}
    return {
        key: round(picks.get(key.rpartition("_")[2], statistics.mean)([row[key] for row in rows]), 4) for key in rows[0]
    }


def compare(competitors: list[Arm], limit_s: float, run: Callable[[Arm], list[Row]]) -> dict[str, Row]:
    """One row per arm; `run` gives the arm's rows, one per seed."""
    found: dict[str, Row] = {}
    for arm in competitors:
        try:
            with limited(limit_s):
                found[arm.name] = merged(run(arm))
        except TookTooLong:
            found[arm.name] = {"not_finished_within_s": limit_s}
        except ValueError as err:
            found[arm.name] = {"not_possible": str(err)}
    return found


def first_plans(loads: Sequence[Load], num_servers: int) -> Callable[[Arm], list[Row]]:
    def run(arm: Arm) -> list[Row]:
        rows = []
        for load_LE in loads:
            servers = make_servers(load_LE, num_servers, arm.extra)
            rows.append(balance(arm.plan(load_LE, servers, None, survive=0), load_LE, servers))
        return rows

    return run


def unequal_plans(loads: Sequence[Load]) -> Callable[[Arm], list[Row]]:
    def run(arm: Arm) -> list[Row]:
        rows = []
        for load_LE in loads:
            servers = unequal_servers(load_LE, 0.125)
            found = arm.plan(load_LE, servers, None, survive=0)
            used_S = np.bincount(found.server_C, minlength=len(servers))
            over = sum(int(used) > server.max_copies for used, server in zip(used_S, servers, strict=True))
            rows.append({**balance(found, load_LE, servers), "servers_over_budget": over})
        return rows

    return run


def replans(pairs: Sequence[tuple[Load, Load]], num_servers: int) -> Callable[[Arm], list[Row]]:
    """From a placement for the first load of a pair to one for the second."""

    def run(arm: Arm) -> list[Row]:
        rows = []
        for before_LE, after_LE in pairs:
            servers = make_servers(before_LE, num_servers, arm.extra)
            old = arm.plan(before_LE, servers, None, survive=0)
            new = arm.plan(after_LE, servers, old, survive=0)
            rows.append(
                {
                    "unplanned_min": float(balancedness(old, after_LE, servers).min()),
                    **balance(new, after_LE, servers),
                    "moved_percent": moved_percent(old, new, before_LE.shape[1], num_servers),
                    "moved_relabelled_percent": moved_percent(
                        old, relabelled(old, new, before_LE.shape[1], num_servers), before_LE.shape[1], num_servers
                    ),
                }
            )
        return rows

    return run


def survivals(loads: Sequence[Load], num_servers: int) -> Callable[[Arm], list[Row]]:
    def run(arm: Arm) -> list[Row]:
        rows = []
        for load_LE in loads:
            servers = make_servers(load_LE, num_servers, arm.extra)
            found = arm.plan(load_LE, servers, None, survive=1)
            rows.append({**survival(found, load_LE, servers), **balance(found, load_LE, servers)})
        return rows

    return run


def times(num_servers: int, repeats: int) -> Callable[[Arm], list[Row]]:
    """Planning seconds of a first plan and of one after the workload has changed, 61 layers x 256 experts."""

    def run(arm: Arm) -> list[Row]:
        before_LE = load_matrices.deepseek_v3_like(seed=0, num_layers=61)
        after_LE = load_matrices.another_workload(before_LE, seed=1)
        servers = make_servers(before_LE, num_servers, arm.extra)
        seconds: dict[str, list[float]] = {"first_s": [], "replan_s": []}
        gc.collect()
        gc.freeze()  # as Serve does in a replica: what else this process holds is not the planner's
        for _ in range(repeats):
            old = arm.plan(before_LE, servers, None, survive=0)
            seconds["first_s"].append(old.plan_s)
            seconds["replan_s"].append(arm.plan(after_LE, servers, old, survive=0).plan_s)
        gc.unfreeze()
        return [{name: statistics.median(values) for name, values in seconds.items()}]

    return run


def run(seeds: int, repeats: int, limit_s: float) -> dict[str, Any]:
    """All comparisons."""
    skewed = [load_matrices.deepseek_v3_like(seed=seed) for seed in range(seeds)]
    others = [
        (load_LE, load_matrices.another_workload(load_LE, seed=100 + seed)) for seed, load_LE in enumerate(skewed)
    ]
    noise = [
        tuple(load_matrices.noisy(load_LE, seed=2 * seed + half, tokens=100_000) for half in (0, 1))
        for seed, load_LE in enumerate(skewed)
    ]
    # 288 slots do not divide over 64 GPUs: the row says so.
    arms_32, arms_64 = arms(32, (288, 320), (0.01,)), arms(64, (288, 320, 384), (0.06,))
    further = {
        "uniform": load_matrices.uniform(),
        "zipf(1.2)": load_matrices.zipf(1.2, seed=0),
        "hot:8:0.4": load_matrices.hot_sets(8, 0.4, seed=0),
    }
    return {
        "first plan, DeepSeek-V3-like load": {
            "32 servers": compare(arms_32, limit_s, first_plans(skewed, 32)),
            "64 servers": compare(arms_64, limit_s, first_plans(skewed, 64)),
        },
        "first plan, other loads, 32 servers": {
            name: compare(arms(32, (288,), (0.01,)), limit_s, first_plans([load_LE], 32))
            for name, load_LE in further.items()
        },
        "first plan, 32 unequal servers, 12.5 % extra bytes": compare(
            [arm for arm in arms(32, (288,), ()) if "EPLB" not in arm.name], limit_s, unequal_plans(skewed)
        ),
        "re-plan after another workload in half of the layers": {
            "32 servers": compare(arms_32, limit_s, replans(others, 32)),
            "64 servers": compare(arms_64, limit_s, replans(others, 64)),
        },
        "re-plan after noise (two measurements over 100,000 tokens), 32 servers": compare(
            arms_32, limit_s, replans([(first, second) for first, second in noise], 32)
        ),
        "survive 1, 32 servers": {
            name: {
                "no placement loses less": {
                    f"{extra:.1%} extra bytes": round(least_lost_percent(loads[0], 32, extra), 4)
                    for extra in (0.125, 1.0)
                },
                **compare(arms(32, (288, 512), ()), limit_s, survivals(loads, 32)),
            }
            for name, loads in (("DeepSeek-V3-like load", skewed[:1]), ("zipf(1.2)", [further["zipf(1.2)"]]))
        },
        "planning CPU seconds, 61 x 256": {
            "32 servers": compare(arms(32, (288,), (0.01,)), limit_s, times(32, repeats)),
            "1024 servers": compare(arms(1024, (1024,), (0.0625,)), limit_s, times(1024, repeats)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    args = parser.parse_args()
    publish(run(args.seeds, args.repeats, args.limit_s), packages=("numpy",), out=args.out)


if __name__ == "__main__":
    main()
