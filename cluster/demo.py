"""The guided run: a small real model under skewed load on this machine, from two servers to more and back.

The story is `Demo.run`, one method per phase. The traffic is the hidden states that the demo model really produces on
texts of two domains. Servers are paced like slower devices (EMULATION), so that two cores suffice for five of them.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from torch import Tensor

from cluster.checking import Checker
from cluster.demo_settings import FIRST_DOMAIN, NAME, SECOND_DOMAIN, Settings
from cluster.demo_timeline import (
    Event,
    Frame,
    Key,
    Measured,
    Phase,
    RecentSamples,
    Timeline,
    Verdict,
    judge,
    judge_answers,
    judge_time,
    ledgers_agree,
)
from cluster.demo_traffic import MixedTraffic, hottest
from cluster.loadgen import LoadGenerator
from cluster.traffic import TraceTraffic
from cluster.watching import Watcher
from protos import router_pb2
from protos.model import ModelSpec
from router.client import RouterClient

NEW_COPY_TARGET_S, NEW_SERVER_TARGET_S = 1.5, 4.0
FRAME_S = 0.2


class Demo:
    """Runs the phases against a deployed cluster.

    Args:
        spec: the model.
        states: domain to layer to hidden states.
        router: "host:port".
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        states: Mapping[str, Mapping[str, Tensor]],
        *,
        router: str,
    ) -> None:
        self.timeline = Timeline()
        self.measured = Measured()
        self.verdicts: list[Verdict] = []
        self.settings = settings
        self.hot = {domain: hottest(layers, spec)[0] for domain, layers in states.items()}
        self._tracked = sorted(set(chain(*(hottest(layers, spec) for layers in states.values()))))
        self._spec = spec
        self._router = router
        self._on_frame: Callable[[Frame], None] = lambda frame: None
        self._traffic = {
            domain: TraceTraffic(layers, num_tokens=settings.tokens_per_request) for domain, layers in states.items()
        }
        self._watcher = Watcher(NAME)
        self._recent = RecentSamples()
        self._phase = ""
        self._phase_began_s = 0.0

    async def run(self, on_frame: Callable[[Frame], None]) -> None:
        """All phases, then the verdicts; `on_frame` is called with every frame, for the live view."""
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._checker = Checker(self._spec, share=self.settings.check_share)
        await self._watcher.look()
        async with RouterClient(self._router) as client:
            self._load = LoadGenerator(
                client,
                MixedTraffic([*self._traffic.values()]),
                rate=0.0,
                max_open=self.settings.max_open_requests,
                postpone=True,
                checker=self._checker,
                on_sample=self._recent.add,
            )
            stop = asyncio.Event()
            self._zero_s = self._loop.time()
            story, film, load = (
                self._loop.create_task(part) for part in (self._story(), self._film(), self._load.run(stop))
            )
            try:
                # The film and the load never end by themselves: what ends first is the story, or an error.
                ended, _ = await asyncio.wait((story, film, load), return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                stop.set()
                story.cancel()
                film.cancel()
                await asyncio.wait((story, film, load))
                await self._checker.close()
                await self._watcher.close()
        self.verdicts.append(judge_answers(self._load.tally, self._checker.checks))

    async def _story(self) -> None:
        before = await self._router_totals(0)
        await self._warm_up()
        await self._skew()
        await self._switch()
        await self._overflow()
        await self._kill()
        await self._calm()
        self._begin("")
        await self._settle_account("every request", before, {})

    # ------------------------------------------------------------------ phases

    async def _warm_up(self) -> None:
        self._begin("warm-up")
        self._offer(self.settings.light_tokens_per_s)
        await asyncio.sleep(self.settings.warm_up_s)

    async def _skew(self) -> None:
        """One domain, much load: its hottest expert gets copies, the pool gets servers, Ray gets nodes."""
        key = self.hot[FIRST_DOMAIN]
        first = {server.server_id for server in self._watcher.servers}
        before = self._watcher.copies([key])[key]
        self._begin(f"skew: {FIRST_DOMAIN}")
        self._load.traffic = self._traffic[FIRST_DOMAIN]
        step_s = self._offer(self.settings.heavy_tokens_per_s)
        done = self.measured

        async def enough() -> bool:
            now_s = self._loop.time() - step_s
            if done.new_copy_s is None or done.new_server_s is None:
                computed = await self._watcher.computed()
                if done.new_copy_s is None and sum(bool(tokens.get(key)) for tokens in computed.values()) > before:
                    done.new_copy_s = self._loop.time() - step_s
                    self._say(f"a new copy of the hottest expert {_name(key)} takes traffic")
                new = [server_id for server_id in computed.keys() - first if any(computed[server_id].values())]
                if done.new_server_s is None and new:
                    done.new_server_s = self._loop.time() - step_s
                    self._say(f"new server {new[0]} takes traffic")
            if done.copies_target_s is None and self._watcher.copies([key])[key] >= 3:
                done.copies_target_s = now_s
            if done.servers_target_s is None and self._serving() >= 4 and self._watcher.nodes >= 4:
                done.servers_target_s = now_s
            return None not in (done.new_copy_s, done.new_server_s, done.copies_target_s, done.servers_target_s)

        await self._until(enough)
        most = self.timeline.most_copies(key, self._phase)
        done.peak_servers = max(frame.num_serving for frame in self.timeline.frames)
        done.peak_nodes = max(frame.nodes for frame in self.timeline.frames)
        self._judge(
            "hot experts get more copies",
            before == 1 and done.copies_target_s is not None,
            f"expert {_name(key)}: {before} to {most} live copies (3 after {_seconds(done.copies_target_s)})",
        )
        self._judge(
            "the busy pool gets more servers, Ray gets more nodes",
            len(first) == self.settings.min_servers and done.servers_target_s is not None,
            f"servers {len(first)} to {done.peak_servers}, nodes "
            f"{self.settings.min_servers + self.settings.spare_nodes} to {done.peak_nodes} "
            f"(4 servers after {_seconds(done.servers_target_s)})",
        )
        self.verdicts.append(
            judge_time("load step to a new copy taking traffic", done.new_copy_s, target_s=NEW_COPY_TARGET_S)
        )
        self.verdicts.append(
            judge_time("load step to a new server taking traffic", done.new_server_s, target_s=NEW_SERVER_TARGET_S)
        )

    async def _switch(self) -> None:
        """Another domain: the hot spot moves, and the copies follow it."""
        key = self.hot[SECOND_DOMAIN]
        before = self._watcher.copies([key])[key]
        self._begin(f"switch: {SECOND_DOMAIN}")
        self._load.traffic = self._traffic[SECOND_DOMAIN]
        step_s = self._loop.time()

        async def moved() -> bool:
            return self._watcher.copies([key])[key] >= 3

        if await self._until(moved):
            self.measured.moved_s = self._held_s - step_s
        self._judge(
            "copies follow the hot spot",
            self.measured.moved_s is not None,
            f"expert {_name(key)}: {before} to {self.timeline.most_copies(key, self._phase)} live copies "
            f"(3 after {_seconds(self.measured.moved_s)})",
        )

    async def _overflow(self) -> None:
        """Requests that allow rerouting and dropping: every pair beyond capacity is accounted for."""
        settings = self.settings
        await self._drain()
        before = await self._router_totals(self._load.tally.totals.requests)
        ours_before = _counts(self._load.tally.totals)
        self._begin("overflow")
        self._load.overflow = router_pb2.OverflowPolicy(
            chain=["copy", "next_expert", "drop"],
            capacity_factor=settings.overflow_capacity_factor,
            max_score_gap=settings.overflow_max_score_gap,
        )
        self._offer(settings.heavy_tokens_per_s)
        await asyncio.sleep(settings.at_least_s)
        await self._drain()
        self._load.overflow = None
        await self._settle_account("overflow", before, ours_before)

    async def _kill(self) -> None:
        """SIGKILL for the server with the most copies, under load."""
        self._offer(self.settings.heavy_tokens_per_s)
        self._begin("kill -9")
        await asyncio.sleep(2.0)
        failed, wrong = self._load.tally.totals.failed_requests, self._checker.checks.wrong
        retried = self._load.tally.totals.retried
        before = {server.server_id for server in self._watcher.servers}
        victim = max(self._watcher.servers, key=lambda server: server.copies)
        os.kill(victim.pid, signal.SIGKILL)
        kill_s = self._loop.time()
        self._say(f"kill -9 server {victim.server_id} (pid {victim.pid}, {victim.copies} copies)")

        async def replaced() -> bool:
            gone = all(server.server_id != victim.server_id for server in self._watcher.servers)
            if not gone or self._watcher.status["missing_experts"]:
                return False
            computed = await self._watcher.computed()
            return any(any(computed[server_id].values()) for server_id in computed.keys() - before)

        if await self._until(replaced):
            self.measured.replaced_s = self._held_s - kill_s
            self._say("its replacement takes traffic")
        await self._drain()
        failed = self._load.tally.totals.failed_requests - failed
        wrong = self._checker.checks.wrong - wrong
        self._judge(
            "a killed server costs no request",
            failed == 0 and wrong == 0 and self.measured.replaced_s is not None,
            f"{failed} failed, {wrong} wrong, {self._load.tally.totals.retried - retried} pairs retried; "
            f"replaced and computing after {_seconds(self.measured.replaced_s)}",
        )

    async def _calm(self) -> None:
        """Almost no load: servers and nodes go, and no request notices."""
        least = self.settings.min_servers
        nodes = least + self.settings.spare_nodes
        self._begin("calm")
        self._load.traffic = MixedTraffic([*self._traffic.values()])
        step_s = self._offer(self.settings.light_tokens_per_s)

        async def back() -> bool:
            return len(self._watcher.servers) == least and self._watcher.nodes == nodes

        if await self._until(back):
            self.measured.calm_s = self._held_s - step_s
        await self._drain()
        self._judge(
            "without load everything shrinks again",
            self.measured.calm_s is not None,
            f"servers {len(self._watcher.servers)}, nodes {self._watcher.nodes} "
            f"({self.settings.spare_nodes} kept as a spare) after {_seconds(self.measured.calm_s)}",
        )

    # ------------------------------------------------------------------ parts

    def _begin(self, phase: str) -> None:
        """Close the running phase and open the next."""
        now_s = self._now_s()
        if self._phase:
            self.timeline.phases.append(Phase(name=self._phase, began_s=self._phase_began_s, ended_s=now_s))
        self._phase, self._phase_began_s = phase, now_s

    def _offer(self, tokens_per_s: float) -> float:
        """Change the load; returns the loop's time."""
        self._load.rate = tokens_per_s / self.settings.tokens_per_request
        return self._loop.time()

    async def _until(self, done: Callable[[], Awaitable[bool]]) -> bool:
        """Stay in the phase until `done`, within its bounds; `_held_s` is when it held. False: it never did."""
        began_s = self._loop.time()
        held = False
        while self._loop.time() < began_s + (self.settings.at_least_s if held else self.settings.at_most_s):
            if not held and await done():
                held, self._held_s = True, self._loop.time()
            await asyncio.sleep(0.05)
        return held

    async def _drain(self) -> None:
        """Stop sending and wait until everything sent is answered."""
        self._load.rate = 0.0
        while self._load.num_open:
            await asyncio.sleep(0.02)

    async def _router_totals(self, num_requests: int) -> dict[str, float]:
        """The router's account, once it has reported at least so many requests."""
        end_s = self._loop.time() + 5.0
        while self._loop.time() < end_s:
            totals: dict[str, float] = self._watcher.status.get("demand", {}).get("totals", {})
            if totals and totals["requests"] >= num_requests:
                return dict(totals)
            await asyncio.sleep(0.05)
        return dict(self._watcher.status.get("demand", {}).get("totals", {}))

    async def _settle_account(self, what: str, before: Mapping[str, float], ours_before: Mapping[str, float]) -> None:
        """Our sum of ledgers against the router's totals, over the requests since `before`; nothing may be open."""
        ours_now = _counts(self._load.tally.totals)
        ours = {name: value - ours_before.get(name, 0) for name, value in ours_now.items()}
        totals = await self._router_totals(int(before["requests"] + ours["requests"]))
        theirs = {name: totals[name] - before[name] for name in ours}
        differences = ledgers_agree(ours, theirs)
        summary = f"{ours['pairs']:,.0f} pairs, {ours['rerouted']:,.0f} rerouted, {ours['dropped']:,.0f} dropped: " + (
            "; ".join(differences) or "client and router agree to the pair"
        )
        if what == "overflow":
            self.measured.overflow = dict(ours)
            some = ours["rerouted"] > 0 and ours["dropped"] > 0
            self._judge(
                "overflow is rerouted or dropped by policy and counted exactly", some and not differences, summary
            )
        else:
            self._judge("the accounts of client and router agree over the whole run", not differences, summary)

    def _judge(self, promise: str, kept: bool, detail: str) -> None:
        self.verdicts.append(judge(promise, kept, detail))
        self._say(f"{promise}: {detail}")

    def _serving(self) -> int:
        return sum(server.state == "serving" for server in self._watcher.servers)

    def _say(self, text: str) -> None:
        self.timeline.events.append(Event(at_s=self._now_s(), text=text))

    def _now_s(self) -> float:
        return self._loop.time() - self._zero_s

    async def _film(self) -> None:
        """A frame every FRAME_S; joins and losses of servers become events."""
        known = {server.server_id for server in self._watcher.servers}
        nodes = self._watcher.nodes
        while True:
            began_s = self._loop.time()
            await self._watcher.look()
            servers = self._watcher.servers
            now = {server.server_id for server in servers}
            for server_id in sorted(now - known):
                self._say(f"server {server_id} joined: {len(now)} servers")
            for server_id in sorted(known - now):
                self._say(f"server {server_id} left: {len(now)} servers")
            if nodes != self._watcher.nodes:
                self._say(f"{self._watcher.nodes} nodes")
            known, nodes = now, self._watcher.nodes
            self._frame(servers)
            await asyncio.sleep(max(0.02, FRAME_S - (self._loop.time() - began_s)))

    def _frame(self, servers: tuple[Any, ...]) -> None:
        tokens_per_s, p50_s, p99_s, rerouted, dropped = self._recent.summary(self._loop.time())
        frame = Frame(
            at_s=self._now_s(),
            phase=self._phase,
            wanted_tokens_per_s=self._load.rate_at(self._loop.time()) * self.settings.tokens_per_request,
            tokens_per_s=tokens_per_s,
            p50_s=p50_s,
            p99_s=p99_s,
            nodes=self._watcher.nodes,
            servers=servers,
            copies=self._watcher.copies(self._tracked),
            rerouted_share=rerouted,
            dropped_share=dropped,
            failed=self._load.tally.totals.failed_requests,
            checked=self._checker.checks.checked,
            wrong=self._checker.checks.wrong,
        )
        self.timeline.frames.append(frame)
        self._on_frame(frame)


def _counts(totals: Any) -> dict[str, float]:
    counts: dict[str, float] = asdict(totals)
    return counts


def _name(key: Key) -> str:
    return f"{key[1]} of layer {key[0]}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
