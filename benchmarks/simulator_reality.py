"""Four scenarios on a real cluster and simulated, with constants of the machine that no scenario was used for.

The cluster is that of `benchmarks.elasticity_stage`: servers paced to a slow device's rate, so that two cores are not
the limit. Measured by themselves are a hop, by an echo between two processes; a call to the placement, by fetching the
table while next to nothing is asked for; and, by servers killed with as little load, the time until routers notice and
until one is replaced (half of it until a replacement is asked for, half as starting). Servers tell how many bytes per
second of their first copies they loaded. Calibrated, so that an idle cluster agrees by construction, is the router's
time for a batch and a message, its jitter by how far p99 lies above the median, the rest by the median; and what
loading takes beside its bytes, by when the requests are answered that are open while an idle cluster loses a server.
A launch and a plan are the simulator's defaults. Nothing is fitted to the scenarios.

Everything is done in rounds, calibration and scenarios in turn, because the machine's pace drifts within minutes; the
median over the rounds counts, of the constants, of the real runs and of the simulated ones (each with another seed).
A kill is met by two to three requests, of which the first waits longest and each further one the distance of two
requests less. Servers are killed KILL_EVERY_S, so that p99 is one of the second ones. With a kill every 10 s or every
5 s it lay between two of these steps, and chance said on which: 0.09 and 0.17 s in two runs.
"""

import asyncio
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.elasticity_slo import Outcome, due_between, percentile_s, simulated_outcomes
from benchmarks.elasticity_stage import (
    EMULATED_PAIRS_PER_S,
    MAX_OPEN,
    MODEL,
    PAIRS_PER_REQUEST,
    TIMEOUT_S,
    TOKENS_PER_REQUEST,
    Stage,
    make_config,
    perform,
)
from benchmarks.processes import Echo, child, make_model
from cluster import app
from cluster.config import ClusterConfig
from cluster.console import interruptible
from cluster.patterns import parse_pattern
from cluster.sim_servers import Machine
from cluster.simulate import Fault, Simulation
from cluster.workloads import DrawnHeat, Workload, pattern_shares
from protos.checkpoint import read_model

Facts = dict[str, Any]
Story = Callable[..., Awaitable[Facts]]
Played = tuple[ClusterConfig, Story, str, float]  # on what, what, the load's pattern, its requests per second

SERVERS = 4
WARM_UP_S = 4.0
FIRST_KILL_S, KILL_EVERY_S = 8.0, 8.0  # after the load began
REPLACED_WITHIN_S = 10.0  # before the end; the next kill waits for it
IDLE_REQUESTS_PER_S = 4.0
MOVE_EVERY_S = 8.0  # the hot spot, where it moves
WITHIN = 0.2  # of the real cluster's throughput and p99


def reality(*, seconds: float, rounds: int) -> Facts:
    """All scenarios, `seconds` each, in so many rounds. SIGTERM unwinds like Ctrl-C: everything started is ended."""
    torch.set_num_threads(1)  # the cores belong to the cluster
    hop_s = asyncio.run(_echo_s()) / 2
    with tempfile.TemporaryDirectory() as folder, interruptible():
        model = make_model(Path(folder) / "model", **MODEL)

        def make(**sections: Any) -> ClusterConfig:
            return make_config(model, least=SERVERS, most=SERVERS, **sections)

        usual, static = make(), make(placement={"max_moves": 0})
        kill = partial(_kill, kills_s=kills_within(seconds))
        full = SERVERS * EMULATED_PAIRS_PER_S / PAIRS_PER_REQUEST  # requests per second
        hottest = full * _balance(static)
        calibrations: dict[str, Played] = {
            "idle": (usual, _idle, "uniform", IDLE_REQUESTS_PER_S),
            "servers replaced": (usual, kill, "uniform", IDLE_REQUESTS_PER_S),
        }
        scenarios: dict[str, Played] = {
            "uniform": (usual, _hold, "uniform", 0.6 * full),
            "static zipf near saturation": (static, _hold, "zipf:1.2", 0.9 * hottest),
            "moving hot spot": (usual, partial(_hold, move_every_s=MOVE_EVERY_S), "zipf:1.2", 0.6 * full),
            "servers killed": (usual, kill, "uniform", 0.5 * full),
        }
        told: dict[str, list[Facts]] = {name: [] for name in (*calibrations, *scenarios)}
        for seed in range(1, rounds + 1):
            for name, (config, play, pattern, rate) in {**calibrations, **scenarios}.items():
                story = partial(play, requests_per_s=rate, seconds=seconds)
                seen, account = perform(config, pattern, seed, story)
                print(json.dumps({name: seen}), file=sys.stderr, flush=True)
                told[name].append({**seen, "account": account})
        constants = _machine(usual, told["idle"], hop_s, told["servers replaced"])
        found: Facts = {"constants": asdict(constants), "calibrations": {name: told[name] for name in calibrations}}
        for name, (config, _, pattern, rate) in scenarios.items():
            runs = []
            for seed, real in enumerate(told[name], start=1):
                faults = [Fault(at_s=at_s, server=0) for at_s in real.get("killed_s", ())]  # the oldest one each time
                moves = real.get("move_every_s", math.inf)
                simulated = _simulate(config, constants, pattern, rate, seconds, faults, move_every_s=moves, seed=seed)
                runs.append({"real": real, "simulated": simulated})
            middle = {side: _median([run[side] for run in runs]) for side in ("real", "simulated")}
            found[name] = {"requests_per_s": rate, **middle, **_compare(**middle), "rounds": runs}
    return found


def _median(runs: Sequence[Facts]) -> Facts:
    """Of every number that all runs tell."""
    numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


async def _hold(stage: Stage, *, requests_per_s: float, seconds: float, move_every_s: float = math.inf) -> Facts:
    first_s = stage.now_s()
    stage.offer(requests_per_s * PAIRS_PER_REQUEST)
    began_s, ended_s = first_s + WARM_UP_S, first_s + WARM_UP_S + seconds
    at_s = move_every_s
    while at_s < WARM_UP_S + seconds:
        await stage.hold(max(0.0, first_s + at_s - stage.now_s()))
        stage.move()
        at_s += move_every_s
    await stage.hold(max(0.0, ended_s - stage.now_s()))
    await stage.drain()
    found = _seen(stage.seen.outcomes, began_s, ended_s)
    return found | ({"move_every_s": move_every_s} if math.isfinite(move_every_s) else {})


async def _idle(stage: Stage, *, requests_per_s: float, seconds: float) -> Facts:
    """As `_hold`, and what the machine's constants need."""
    first_s = stage.now_s()
    found = await _hold(stage, requests_per_s=requests_per_s, seconds=seconds)
    took_s = [each.took_s for each in due_between(stage.seen.outcomes, first_s + WARM_UP_S, float("inf"))]
    loaded = [server["loaded"] for server in (await app.status(stage.config.name))["servers"]]
    control_s = await _call_s(stage.config.name) / 2
    return found | {"took_s": took_s, "load_bytes_per_s": _rate(loaded), "control_s": control_s}


def kills_within(seconds: float) -> list[float]:
    """The kills of a scenario of that length, in seconds from its start; after each is time for a replacement."""
    last_s = WARM_UP_S + seconds - REPLACED_WITHIN_S
    return np.arange(FIRST_KILL_S, last_s + 1e-9, KILL_EVERY_S).tolist() or [WARM_UP_S]


async def _kill(stage: Stage, *, requests_per_s: float, seconds: float, kills_s: Sequence[float]) -> Facts:
    """Servers killed by their pids, each time the oldest; when, and how long until each was replaced."""
    first_s = stage.now_s()
    stage.offer(requests_per_s * PAIRS_PER_REQUEST)
    began_s, ended_s = first_s + WARM_UP_S, first_s + WARM_UP_S + seconds
    pids: dict[str, int] = {}  # by server, in order of joining
    killed_s, replaced_s = [], []
    for at_s in kills_s:
        await stage.hold(max(0.0, first_s + at_s - stage.now_s()))
        running = {server["id"]: server["pid"] for server in (await app.status(stage.config.name))["servers"]}
        pids = {name: pid for name, pid in (pids | running).items() if name in running}
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        killed_s.append(stage.now_s() - first_s)
        replaced_s.append(await _replaced_s(stage, set(pids), ended_s))
    await stage.hold(max(0.0, ended_s - stage.now_s()))
    await stage.drain()
    lost = [event["at_s"] for event in stage.seen.events_between(first_s, ended_s, "server_lost")]
    noticed_s = [min(at_s for at_s in lost if at_s >= first_s + died_s) - first_s - died_s for died_s in killed_s]
    found = _seen(stage.seen.outcomes, began_s, ended_s)
    return found | {
        "killed_s": killed_s,
        "noticed_s": noticed_s,
        "resumed_s": resumed_s(stage.seen.outcomes, [first_s + died_s for died_s in killed_s]),
        "replaced_s": replaced_s,
    }


def resumed_s(outcomes: Sequence[Outcome], killed_s: Sequence[float]) -> list[float]:
    """Seconds from each kill until the requests that were open then are answered; of the kills that meet any."""
    found = []
    for died_s in killed_s:
        begun = due_between(outcomes, died_s - TIMEOUT_S, died_s)
        ended_s = [each.due_s + each.took_s for each in begun if math.isfinite(each.took_s)]
        found += [max(ended_s) - died_s] if max(ended_s, default=0.0) > died_s else []
    return found


async def _replaced_s(stage: Stage, known: set[str], ended_s: float) -> float:
    """Seconds until a server that was not known holds copies.

    Raises:
        RuntimeError: none did before the end.
    """
    began_s = stage.now_s()
    while stage.now_s() < ended_s:
        now = (await app.status(stage.config.name))["servers"]
        if any(server["id"] not in known and server["copies"] for server in now):
            return stage.now_s() - began_s
        await asyncio.sleep(0.1)
    raise RuntimeError("no server held copies in place of the killed one before the end")


async def _call_s(name: str) -> float:
    """A call to the placement with its answer, the table: the median of some, one after the other."""
    took = []
    for _ in range(50):
        began_s = time.perf_counter()
        await app.table(name)
        took.append(time.perf_counter() - began_s)
        await asyncio.sleep(0.02)
    return statistics.median(took)


def _seen(outcomes: Sequence[Outcome], began_s: float, ended_s: float) -> Facts:
    """What became of the requests due within a span, whenever they were answered; real and simulated ones alike."""
    found = due_between(outcomes, began_s, ended_s)
    answered = [each for each in found if each.took_s < float("inf")]
    return {
        "tokens_per_s": len(answered) * TOKENS_PER_REQUEST / (ended_s - began_s),
        **{f"p{percent}_s": percentile_s(answered, percent) for percent in (50, 90, 99)},
        "failed": len(found) - len(answered),
    }


def _rate(loaded: Sequence[Mapping[str, Facts]]) -> float:
    """Bytes per second at which servers loaded, from what each says of its sources."""
    sources = [source for server in loaded for source in server.values()]
    return float(sum(source["bytes"] for source in sources) / sum(source["seconds"] for source in sources))


def _machine(config: ClusterConfig, idles: Sequence[Facts], hop_s: float, replaced: Sequence[Facts]) -> Machine:
    """What an idle request takes beyond its pairs and its hops is the router's thread: half for the batch, half for
    the messages to and from every server, and jitter. What open requests wait at a kill beyond the messages, the bytes
    and their pairs is the servers' loading, whatever it copies."""

    idle = _median(idles)
    waited_s = sorted(took_s for run in idles for took_s in run["took_s"])
    idle |= {
        f"p{percent}_s": float(np.percentile(waited_s, percent, method="higher")) for percent in (50, 99)
    }  # a run alone has few

    def median_s(name: str) -> float:
        return float(statistics.median(value for run in replaced for value in run[name]))

    replaced_s = median_s("replaced_s")
    bare = Machine(
        pairs_per_s=EMULATED_PAIRS_PER_S,
        emulated=True,
        hop_s=hop_s,
        client_s=2 * hop_s,
        batch_s=0.0,
        message_s=0.0,
        control_s=idle["control_s"],
        load_bytes_per_s=idle["load_bytes_per_s"],
        notice_s=median_s("noticed_s"),
        start_s=replaced_s / 2,
        replace_s=replaced_s / 2,
    )

    def told(machine: Machine) -> Facts:
        return _simulate(config, machine, "uniform", IDLE_REQUESTS_PER_S, 100.0, [])

    def spread_s(found: Facts) -> float:
        return float(found["p99_s"] - found["p50_s"])

    jittery = replace(
        bare, jitter_s=_fitted_s(lambda jitter_s: spread_s(told(replace(bare, jitter_s=jitter_s))), spread_s(idle))
    )
    rest_s = max(idle["p50_s"] - told(jittery)["p50_s"], 0.0)
    usual = replace(jittery, batch_s=rest_s / 2, message_s=rest_s / 2 / (2 * SERVERS))

    def idle_resumed_s(load_s: float) -> float:
        machine = replace(usual, load_s=load_s)
        return statistics.median(
            each
            for seed, run in enumerate(replaced, start=1)
            for each in _simulated_resumed_s(config, machine, run["killed_s"], seed=seed)
        )

    load_s = _fitted_s(idle_resumed_s, median_s("resumed_s"))
    return replace(usual, load_s=load_s, start_s=usual.start_s - load_s / 2, replace_s=usual.replace_s - load_s / 2)


def _fitted_s(measure: Callable[[float], float], wanted_s: float) -> float:
    """The constant, 0 to `wanted_s`, with which a simulation measures what is wanted, or the nearest to it."""
    low_s, high_s = 0.0, wanted_s
    for _ in range(8):
        middle_s = (low_s + high_s) / 2
        if measure(middle_s) < wanted_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s


def _simulated_resumed_s(
    config: ClusterConfig, machine: Machine, killed_s: Sequence[float], *, seed: int
) -> list[float]:
    faults = [Fault(at_s=at_s, server=0) for at_s in killed_s]
    sim = _simulation(config, machine, "uniform", IDLE_REQUESTS_PER_S, faults, seed=seed)
    sim.run(max(killed_s) + REPLACED_WITHIN_S)
    return resumed_s(simulated_outcomes(sim.record), killed_s)


def _balance(config: ClusterConfig) -> float:
    """Mean over most loaded server of the placement that does not know the load."""
    found = _simulation(config, Machine(pairs_per_s=EMULATED_PAIRS_PER_S), "zipf:1.2", 1.0, [])
    return float(found.run(2.0)["timeline"][-1]["balancedness_min"])


def _simulation(
    config: ClusterConfig,
    constants: Machine,
    pattern: str,
    rate: float,
    faults: Sequence[Fault],
    *,
    move_every_s: float = math.inf,
    seed: int = 1,
) -> Simulation:
    spec = read_model(Path(config.model))
    shares = pattern_shares(
        parse_pattern(pattern), num_layers=len(spec.layers), num_experts=spec.num_experts, top_k=spec.top_k
    )
    workload = Workload(
        layers=spec.layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        heat=DrawnHeat(
            shares,
            top_k=spec.top_k,
            move="jump",
            every_s=move_every_s,
            seed=seed,
        ),
        rate=rate,
        num_tokens=TOKENS_PER_REQUEST,
    )
    return Simulation(
        config,
        workload,
        constants,
        copy_bytes=spec.expert_params * 4,
        row_bytes=spec.expert_dim * 4,
        faults=faults,
        max_open=MAX_OPEN,
        seed=seed,
    )


def _simulate(
    config: ClusterConfig,
    constants: Machine,
    pattern: str,
    rate: float,
    seconds: float,
    faults: Sequence[Fault],
    *,
    move_every_s: float = math.inf,
    seed: int = 1,
) -> Facts:
    """As the real one: a warm-up, then what is due within `seconds`; what is open at the end is answered later."""
    sim = _simulation(config, constants, pattern, rate, faults, move_every_s=move_every_s, seed=seed)
    sim.run(WARM_UP_S + seconds)
    return _seen(simulated_outcomes(sim.record), WARM_UP_S, WARM_UP_S + seconds)


def _compare(real: Facts, simulated: Facts) -> Facts:
    ratios = {f"{name}_ratio": simulated[name] / real[name] for name in ("tokens_per_s", "p50_s", "p99_s")}
    close = all(abs(ratios[f"{name}_ratio"] - 1) <= WITHIN for name in ("tokens_per_s", "p99_s"))
    return {**ratios, "within": close}


async def _echo_s() -> float:
    """The round trip of one message of a request's size between two processes."""
    message = [[bytes(TOKENS_PER_REQUEST * MODEL["dim"] * 4 // SERVERS)]]
    with ExitStack() as stack:
        _, ready = stack.enter_context(child("-m", "benchmarks.processes", "echo"))
        echo = Echo([ready["address"]])
        took = []
        for _ in range(300):
            began_s = time.perf_counter()
            await echo.call(message)
            took.append(time.perf_counter() - began_s)
        await echo.close()
    return statistics.median(took)
