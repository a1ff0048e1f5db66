"""Where the elasticity benchmark takes place: a deployed cluster with slow (emulated) servers, under observed load.

Two cores stand for a machine room: every server is paced to EMULATED_PAIRS_PER_S routed pairs per second, so that the
cores are not the limit; how busy they were is measured and part of every result. Nodes and GPUs are fake.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray import serve

from benchmarks.elasticity_slo import Outcome, outcome
from cluster import app
from cluster.bring_up import bring_up
from cluster.checking import Checker
from cluster.config import ClusterConfig, parse_config
from cluster.console import interruptible
from cluster.loadgen import LoadGenerator
from cluster.local import LocalRay, NodeScaling, connect, start_ray
from cluster.patterns import parse_pattern
from cluster.traffic import DrawnTraffic, Traffic
from protos.checkpoint import read_model
from protos.loops import freeze_garbage_collector
from router.client import RouterClient

# One MoE layer, because a layer is as slow as its most loaded server: over several independent layers the hot spots
# of one would hide in the cold spots of another.
MODEL = {"layers": 1, "num_experts": 32, "top_k": 2, "dim": 64, "hidden_dim": 64}
EMULATED_PAIRS_PER_S = 500.0
TOKENS_PER_REQUEST = 32
PAIRS_PER_REQUEST = TOKENS_PER_REQUEST * MODEL["top_k"]
BUDGET_COPIES = 24  # memory of one server: it cannot hold every expert
SKEW = "zipf:1.2"
CORES_PER_NODE = 1  # Ray starts a Python worker ahead for each
CALM_BUSY = 0.7  # of the machine's cores, for CALM_S: half of them Ray's many processes take always
CALM_S = 2.0
CALM_TIMEOUT_S = 240.0
STOLEN_CORES = 0.1  # given to other machines by the host: with more, what is late says little about us
ATTEMPTS = 3
CHECK_SHARE = 0.1
TIMEOUT_S = 15.0
MAX_OPEN = 1500
LOOK_S = 0.25
READY_TIMEOUT_S = 120.0

Told = TypeVar("Told")


def make_config(
    model: Path, *, least: int, most: int, budget_copies: int = BUDGET_COPIES, **sections: Mapping[str, Any]
) -> ClusterConfig:
    """The cluster of one arm: `least` to `most` servers, one per node, each with memory for `budget_copies`; `sections`
    adds to placement and scaling.

    The first plan waits for all `least` servers: a placement that stays as it is must know every one of them.
    """
    spec = read_model(model)
    placement = {"settle_s": READY_TIMEOUT_S, **sections.get("placement", {})}
    return parse_config(
        {
            "model": str(model),
            "name": "elasticity",
            "router": {"http_port": _free_port(), "num_cpus": 0.1, "settings": {"compute_threads": 1}},
            "experts": {
                "min_servers": least,
                "max_servers": most,
                "num_gpus": 1,
                "num_cpus": 0.1,
                "max_servers_per_node": 1,
                "drain_timeout_s": 10,
                "settings": {
                    "device": "cpu",
                    "budget_bytes": budget_copies * spec.expert_params * 4,
                    "compute_threads": 1,
                    "emulated_tokens_per_s": EMULATED_PAIRS_PER_S,
                },
            },
            **sections,
            "placement": placement,
        }
    )


@dataclass(slots=True)
class Seen:
    """What was observed, in order of time (the event loop's clock)."""

    outcomes: list[Outcome] = field(default_factory=list)  # in order of answers until `settle`
    servers: list[tuple[float, int]] = field(default_factory=list)  # replicas Serve runs, starts or stops
    busy: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)  # busy shares of the serving ones
    copies: list[tuple[float, int]] = field(default_factory=list)  # held by all servers
    events: list[dict[str, Any]] = field(default_factory=list)  # of the placement, at_s on the loop's clock

    def settle(self) -> None:
        """Put the outcomes in order of departure; call it when nothing is open."""
        self.outcomes.sort()

    def events_between(self, begin_s: float, end_s: float, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind and begin_s <= event["at_s"] < end_s]


class Stage:
    """A deployed cluster under load.

    Args:
        config: what is deployed.
        client: to its router.
        traffic: makes the requests, given the clock on which a hot spot moves at every whole second.
        checker: of a share of the answers.
    """

    def __init__(
        self,
        config: ClusterConfig,
        client: RouterClient,
        traffic: Callable[[Callable[[], float]], Traffic],
        checker: Checker,
    ) -> None:
        self.config = config
        self.seen = Seen()
        self.load = LoadGenerator(
            client,
            traffic(lambda: float(self._moves)),
            rate=0.0,
            max_open=MAX_OPEN,
            timeout_s=TIMEOUT_S,
            checker=checker,
            on_sample=lambda sample: self.seen.outcomes.append(outcome(sample)),
        )
        self._moves = 0
        self._loop = asyncio.get_running_loop()

    def now_s(self) -> float:
        return self._loop.time()

    def offer(self, pairs_per_s: float) -> None:
        """Change the offered load."""
        self.load.rate = pairs_per_s / PAIRS_PER_REQUEST

    def move(self) -> None:
        """The hot spot goes somewhere else."""
        self._moves += 1

    async def hold(self, seconds: float) -> tuple[float, float]:
        """Let it run; returns from when to when."""
        began_s = self.now_s()
        await asyncio.sleep(seconds)
        return began_s, self.now_s()

    async def until(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Wait for something; False if it did not come about in time."""
        end_s = self.now_s() + timeout_s
        while not condition() and self.now_s() < end_s:
            await asyncio.sleep(0.05)
        return condition()

    async def drain(self) -> None:
        """Stop the load and wait until everything is answered; outcomes are in order afterwards."""
        self.load.rate = 0.0
        while self.load.num_open:
            await asyncio.sleep(0.02)
        self.seen.settle()

    @property
    def num_servers(self) -> int:
        """Server processes when last looked."""
        return self.seen.servers[-1][1] if self.seen.servers else 0


def perform(
    config: ClusterConfig, pattern: str, seed: int, story: Callable[[Stage], Awaitable[Told]]
) -> tuple[Told, dict[str, Any]]:
    """Start a Ray, deploy, run `story` under load, end all; returns what it told, and the account of the whole arm.

    Where other machines on the host took more than STOLEN_CORES meanwhile, it is done again; the least disturbed one
    counts, whatever it told.

    Args:
        pattern: of the load, see `cluster.patterns`.
        seed: of the load.
    """
    return least_disturbed(lambda: _attempt(config, pattern, seed, story))


def least_disturbed(attempt: Callable[[], tuple[Told, dict[str, Any]]]) -> tuple[Told, dict[str, Any]]:
    """What came of the attempt with the least stolen of the machine: the first with little of that, or of ATTEMPTS."""
    tried: list[tuple[Told, dict[str, Any]]] = []
    while len(tried) < ATTEMPTS and (not tried or _stolen(tried[-1]) > STOLEN_CORES):
        tried.append(attempt())
    told, account = min(tried, key=_stolen)
    return told, account | {"stolen_in_attempts": [_stolen(each) for each in tried]}


def _stolen(tried: tuple[Any, Mapping[str, Any]]) -> float:
    return float(tried[1]["cores_busy"]["stolen"])


def _attempt(
    config: ClusterConfig, pattern: str, seed: int, story: Callable[[Stage], Awaitable[Told]]
) -> tuple[Told, dict[str, Any]]:
    most = config.experts.max_servers
    nodes = NodeScaling(min_nodes=most, max_nodes=most, cpus_per_node=CORES_PER_NODE, idle_s=3600.0)
    with ExitStack() as stack:
        local = start_ray(num_cpus=2, nodes=nodes)
        stack.callback(_uninterrupted, local.stop)
        connect(local.address)
        stack.callback(_uninterrupted, ray.shutdown)
        stack.enter_context(interruptible())  # connecting has put another handler in place, which aborts
        _wait_until_calm(local, idle_workers=most)
        found = bring_up(config, timeout_s=READY_TIMEOUT_S)
        stack.callback(_uninterrupted, serve.shutdown)
        _wait_until_calm(local, idle_workers=most)
        return asyncio.run(_perform(local, config, found["router"]["grpc"], pattern, seed, story))


def _uninterrupted(clean_up: Callable[[], Any]) -> None:
    """Cleaning up is finished before a signal counts."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda signum, frame: came.append(signum)) for number in numbers]
    try:
        clean_up()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


async def _perform(
    local: LocalRay,
    config: ClusterConfig,
    router: str,
    pattern: str,
    seed: int,
    story: Callable[[Stage], Awaitable[Told]],
) -> tuple[Told, dict[str, Any]]:
    cores = Cores(local)
    checker = Checker(read_model(Path(config.model)), share=CHECK_SHARE, seed=seed)
    async with RouterClient(router) as client:
        traffic = partial(
            DrawnTraffic,
            parse_pattern(pattern),
            await client.describe(),
            num_tokens=TOKENS_PER_REQUEST,
            seed=seed,
            move_every_s=1.0,
        )
        stage, stop = Stage(config, client, lambda clock: traffic(clock=clock), checker), asyncio.Event()
        freeze_garbage_collector()
        telling = asyncio.ensure_future(story(stage))
        around = [asyncio.create_task(part) for part in (stage.load.run(stop), _watch(config.name, local, stage.seen))]
        try:
            # Load and watch never end by themselves: what ends first is the story, or an error.
            ended, _ = await asyncio.wait((telling, *around), return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            stop.set()
            telling.cancel()
            around[1].cancel()
            await asyncio.wait((telling, *around))
            await checker.close()
    tally = stage.load.tally
    return telling.result(), {
        "requests": tally.totals.requests,
        "failed": tally.totals.failed_requests,
        "errors": dict(tally.errors),
        "first_error": tally.first_error,
        "retried_pairs": tally.totals.retried,
        "checks": asdict(checker.checks),
        "plans": sum(event["kind"] == "plan" for event in stage.seen.events),
        "cores_busy": cores.busy(),
    }


async def _watch(name: str, local: LocalRay, seen: Seen) -> None:
    """Status and processes every LOOK_S."""
    loop = asyncio.get_running_loop()
    known: set[tuple[float, str]] = set()
    while True:
        began_s = loop.time()
        running = await asyncio.to_thread(num_processes, local.session, b"ExpertServer")  # a /proc may make it wait
        seen.servers.append((began_s, running))
        with suppress(Exception):  # Ray's and Serve's errors, and a placement that does not answer in time
            found = await asyncio.wait_for(app.status(name), 3.0)
            now_s = loop.time()
            serving = [server for server in found["servers"] if server["state"] == "serving"]
            seen.busy.append((now_s, tuple(server["busy"] for server in serving)))
            seen.copies.append((now_s, sum(server["copies"] for server in found["servers"])))
            to_loop_s = now_s - time.time()
            for event in found["events"]:
                if (event["at_s"], event["detail"]) not in known:
                    known.add((event["at_s"], event["detail"]))
                    seen.events.append({**event, "at_s": event["at_s"] + to_loop_s})
        await asyncio.sleep(max(0.02, LOOK_S - (loop.time() - began_s)))


def num_processes(session: int, title: bytes) -> int:
    """Processes of that POSIX session with this in their command line; Ray's workers say there what they are.

    An expert server counts from its first to its last moment: starting, serving and draining ones all cost something.
    Asking Serve's controller for them four times a second takes more CPU than a server's whole work.
    """
    found = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and title in (process / "cmdline").read_bytes():
                found += os.getsid(int(process.name)) == session
        except OSError:  # it has just ended
            continue
    return found


def _wait_until_calm(local: LocalRay, *, idle_workers: int) -> None:
    """Until Ray and we have started what we start ahead: it would take the cores from what is measured."""
    end_s = time.monotonic() + CALM_TIMEOUT_S
    while time.monotonic() < end_s:
        busy = psutil.cpu_percent(CALM_S) / 100
        if busy < CALM_BUSY and num_processes(local.session, b"ray::IDLE") >= idle_workers:
            return
    raise TimeoutError(
        f"after {CALM_TIMEOUT_S:g} s {busy:.0%} of the cores are busy and "
        f"{num_processes(local.session, b'ray::IDLE')} of {idle_workers} nodes have a warm worker"
    )


class Cores:
    """CPU seconds per second from now on: of our Ray and everything in it, of this process, of the whole machine, and
    those that other machines on the same host took."""

    def __init__(self, local: LocalRay) -> None:
        self._local = local
        self._began_s = time.monotonic()
        self._before = self._read()

    def busy(self) -> dict[str, float]:
        """Busy cores by part. Processes that started or ended meanwhile count with what they had used at the end."""
        elapsed_s = time.monotonic() - self._began_s
        now = self._read()
        return {name: round((now[name] - self._before[name]) / elapsed_s, 3) for name in now} | {
            "of": float(psutil.cpu_count() or 1)
        }

    def _read(self) -> dict[str, float]:
        whole = psutil.cpu_times()
        return {
            "cluster": sum(filter(None, map(_cpu_s, self._local.pids()))),
            "load_generator": _cpu_s(None),
            "machine": sum(whole) - whole.idle - whole.iowait - whole.steal - whole.guest - whole.guest_nice,
            "stolen": whole.steal,
        }


def _cpu_s(pid: int | None) -> float:
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(used.user + used.system)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
