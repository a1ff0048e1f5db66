"""The fleet's three rules, by example and under random interleavings against simulated servers and routers."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet import Fleet
from cluster.members import STUCK_S
from cluster.messages import Assignment, Key, ServerHello
from cluster.steps import Load, Reason, Unload
from router.table import CopyShare, PlacementTable, empty_table

NUM_EXPERTS = 3
KEYS: list[Key] = [("0", expert) for expert in range(NUM_EXPERTS)]


def hello(server_id: str, max_copies: int = 8) -> ServerHello:
    return ServerHello(server_id=server_id, address=f"{server_id}:1", node="n", pid=1, max_copies=max_copies)


def shares(*server_ids: str) -> tuple[CopyShare, ...]:
    return tuple(CopyShare(server_id=server_id, share=1 / len(server_ids)) for server_id in server_ids)


def load(key: Key, server_id: str, gain: float, reason: Reason = "load") -> Load:
    return Load(key=key, server_id=server_id, reason=reason, gain=gain)


def named(table: PlacementTable, key: Key) -> set[str]:
    return {copy.server_id for copy in table.copies.get(key, ())}


def make_fleet(*, expected_servers: int = 1) -> Fleet:
    return Fleet(num_experts=NUM_EXPERTS, expected_servers=expected_servers, dead_after_s=3.0, settle_s=2.0)


@dataclass
class Server:
    """An expert server as the fleet sees it: obeys assignments, one step at a time."""

    server_id: str
    held: set[Key] = field(default_factory=set)
    assignment: Assignment | None = None
    applied: int = 0
    seq: int = 0
    highest_epoch: int = 0
    inbox: Assignment | None = None  # an answer on its way

    def register(self, fleet: Fleet, now_s: float) -> None:
        self.seq += 1
        self.assignment = fleet.register(
            hello(self.server_id),
            held=frozenset(self.held),
            highest_epoch=self.highest_epoch,
            seq=self.seq,
            now_s=now_s,
        )
        self.applied = self.assignment.version
        self.inbox = None

    def ask(self, fleet: Fleet) -> None:
        self.inbox = self.inbox or fleet.assignment(self.server_id)

    def receive(self) -> None:
        self.assignment, self.inbox = self.inbox or self.assignment, None

    def poll(self, fleet: Fleet) -> None:
        self.assignment = fleet.assignment(self.server_id) or self.assignment

    def step(self) -> None:
        """Unload everything unwanted, or load one copy."""
        if self.assignment is None:
            return
        self.held &= set(self.assignment.copies)
        self.applied = max(self.applied, self.assignment.version)
        for key in self.assignment.copies:
            if key not in self.held:
                self.held.add(key)
                return

    def report(self, fleet: Fleet, now_s: float) -> None:
        self.seq += 1
        known = fleet.report_server(
            self.server_id, held=frozenset(self.held), applied_version=self.applied, seq=self.seq, now_s=now_s
        )
        if not known:
            self.register(fleet, now_s)
        self.highest_epoch = max(self.highest_epoch, fleet.epoch)

    def settle(self, fleet: Fleet, now_s: float) -> None:
        self.poll(fleet)
        for _ in range(NUM_EXPERTS + 1):
            self.step()
        self.report(fleet, now_s)


@dataclass
class Router:
    """A router: adopts newer tables, keeps older ones while batches use them."""

    router_id: str
    table: PlacementTable = field(default_factory=lambda: empty_table(NUM_EXPERTS))
    in_use: list[PlacementTable] = field(default_factory=list)

    def poll(self, fleet: Fleet) -> None:
        if fleet.table.epoch > self.table.epoch:
            self.table = fleet.table

    def report(self, fleet: Fleet, now_s: float) -> None:
        fleet.report_router(
            self.router_id,
            epoch=self.table.epoch,
            oldest_epoch=min([self.table.epoch, *(table.epoch for table in self.in_use)]),
            known_servers=frozenset(server.server_id for server in self.table.servers),
            now_s=now_s,
        )


def two_servers_and_a_router() -> tuple[Fleet, Server, Server, Router]:
    fleet, a, b, router = make_fleet(expected_servers=2), Server("a"), Server("b"), Router("r")
    a.register(fleet, 0.0)
    b.register(fleet, 0.0)
    router.report(fleet, 0.0)
    return fleet, a, b, router


def test_a_copy_enters_the_table_only_when_its_server_observed_it() -> None:
    fleet, a, _, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.poll(fleet)
    assert a.assignment is not None
    assert a.assignment.copies == (KEYS[0],)
    assert not fleet.table.copies
    a.step()
    a.report(fleet, 1.0)
    assert named(fleet.table, KEYS[0]) == {"a"}


def test_the_last_copy_of_an_expert_makes_room_where_the_plan_says_so() -> None:
    fleet, a, _, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    router.poll(fleet)
    fleet.adopt({KEYS[1]: shares("b")}, (), 2.0)
    assert named(fleet.table, KEYS[0]) == {"a"}, "a plan that only forgets it takes nothing away"
    fleet.adopt({KEYS[1]: shares("a")}, [Unload(key=KEYS[0], server_id="a", reason="memory")], 3.0)
    assert not named(fleet.table, KEYS[0])
    assert KEYS[0] not in fleet.current, "the next plan does not count on it"
    a.settle(fleet, 3.0)
    assert KEYS[0] in a.held, "a router may still use it"
    router.poll(fleet)
    router.report(fleet, 3.1)
    a.settle(fleet, 3.1)
    assert a.held == {KEYS[1]}
    fleet.adopt({KEYS[0]: shares("a"), KEYS[1]: shares("a")}, (), 4.0)
    a.settle(fleet, 4.0)
    assert named(fleet.table, KEYS[0]) == {"a"}, "it may come back"


def test_a_move_keeps_the_old_copy_until_the_new_one_serves_and_routers_left_it() -> None:
    fleet, a, b, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    router.poll(fleet)
    router.in_use.append(router.table)
    fleet.adopt({KEYS[0]: shares("b")}, (), 2.0)
    assert named(fleet.table, KEYS[0]) == {"a"}
    b.settle(fleet, 2.0)
    assert named(fleet.table, KEYS[0]) == {"b"}
    router.poll(fleet)
    router.report(fleet, 2.0)
    a.settle(fleet, 2.0)
    assert a.held == {KEYS[0]}, "a batch still uses the epoch that names it"
    router.in_use.clear()
    router.report(fleet, 2.1)
    a.settle(fleet, 2.1)
    assert not a.held


def test_a_silent_router_does_not_hold_back_an_unload_forever() -> None:
    fleet, a, b, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    fleet.adopt({KEYS[0]: shares("b")}, (), 2.0)
    b.settle(fleet, 2.0)
    a.report(fleet, 4.0)
    b.report(fleet, 4.0)
    fleet.expire(4.5)
    a.settle(fleet, 4.5)
    assert not a.held


def test_loads_wait_for_free_bytes() -> None:
    fleet = make_fleet()
    fleet.register(hello("a", max_copies=2), held=frozenset(), highest_epoch=0, seq=1, now_s=0.0)
    fleet.adopt(
        {key: shares("a") for key in KEYS},
        [load(KEYS[2], "a", 0.9), load(KEYS[0], "a", 0.5), load(KEYS[1], "a", 0.1)],
        0.0,
    )
    first = fleet.assignment("a")
    assert first is not None
    assert first.copies == (KEYS[2], KEYS[0])
    fleet.adopt({key: shares("a") for key in KEYS[:2]}, [], 0.0)
    second = fleet.assignment("a")
    assert second is not None
    assert set(second.copies) == {KEYS[0], KEYS[1]}
    assert second.version > first.version


def copies_of(fleet: Fleet, server_id: str) -> set[Key]:
    found = fleet.assignment(server_id)
    assert found is not None
    return set(found.copies)


def test_a_byte_budget_spreads_loads_over_time_but_never_holds_back_a_missing_expert() -> None:
    fleet = Fleet(num_experts=NUM_EXPERTS, expected_servers=2, copy_bytes=100, load_bytes_per_s=100.0)
    for server_id in ("a", "b"):
        fleet.register(hello(server_id), held=frozenset(), highest_epoch=0, seq=1, now_s=0.0)
    loads = [load(KEYS[0], "a", 0.2), load(KEYS[1], "b", 0.4), load(KEYS[2], "a", 0.0, "missing")]
    fleet.adopt({KEYS[0]: shares("a"), KEYS[1]: shares("b"), KEYS[2]: shares("a")}, loads, 0.0)
    assert (copies_of(fleet, "a"), copies_of(fleet, "b")) == ({KEYS[2]}, {KEYS[1]})
    fleet.expire(0.5)
    assert copies_of(fleet, "a") == {KEYS[2]}
    fleet.expire(1.1)
    assert copies_of(fleet, "a") == {KEYS[0], KEYS[2]}


def test_a_newer_plan_takes_back_what_no_server_has_finished() -> None:
    fleet, a, b, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    router.poll(fleet)
    router.report(fleet, 1.0)
    fleet.adopt({KEYS[0]: shares("b")}, (), 2.0)
    assert copies_of(fleet, "b") == {KEYS[0]}
    fleet.adopt({KEYS[0]: shares("a")}, (), 2.1)
    assert copies_of(fleet, "b") == set()
    b.settle(fleet, 2.2)
    assert named(fleet.table, KEYS[0]) == {"a"}


def test_an_assignment_says_who_else_holds_what_is_still_to_be_loaded() -> None:
    fleet, a, b, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    fleet.adopt({KEYS[0]: shares("a", "b"), KEYS[1]: shares("b")}, (), 2.0)
    found = fleet.assignment("b")
    assert found is not None
    assert found.sources == {KEYS[0]: ("a:1",)}
    b.settle(fleet, 2.0)
    assert fleet.assignment("b") == Assignment(version=found.version, copies=found.copies)


def test_full_servers_that_wait_for_each_other_let_go_of_copies_that_others_hold() -> None:
    fleet = make_fleet(expected_servers=3)
    servers = [Server("a"), Server("b"), Server("c")]
    for server in servers:
        server.assignment = fleet.register(
            hello(server.server_id, 2), held=frozenset(), highest_epoch=0, seq=1, now_s=0.0
        )

    def quiet(now_s: float) -> None:
        for _ in range(4):
            for server in servers:
                server.settle(fleet, now_s)

    x, y, z = KEYS
    fleet.adopt({x: shares("a", "c"), y: shares("b", "c"), z: shares("a", "b")}, (), 0.0)
    quiet(0.0)
    wanted = {x: shares("b"), y: shares("a"), z: shares("a", "b")}
    fleet.adopt(wanted, (), 1.0)
    quiet(1.0)
    assert dict(fleet.table.copies) != wanted  # a and b are full of what the other one waits for
    quiet(1.1 + STUCK_S)
    quiet(1.2 + STUCK_S)
    assert dict(fleet.table.copies) == wanted


def test_a_dead_servers_copies_leave_the_table_at_once() -> None:
    fleet, a, b, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a", "b")}, (), 1.0)
    a.settle(fleet, 1.0)
    b.settle(fleet, 1.0)
    before = fleet.epoch
    fleet.remove_server("a", 1.5)
    assert fleet.epoch > before
    assert fleet.table.copies[KEYS[0]] == shares("b")
    assert [server.server_id for server in fleet.table.servers] == ["b"]
    assert fleet.assignment("a") is None


def test_silence_is_death_and_a_heartbeat_afterwards_asks_to_register_again() -> None:
    fleet, a, b, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    b.report(fleet, 4.0)
    assert fleet.expire(4.1) == ("a",)
    assert not fleet.table.copies
    a.report(fleet, 4.2)
    assert named(fleet.table, KEYS[0]) == {"a"}, "what it still holds serves again"


def test_a_draining_server_is_released_only_when_others_took_over() -> None:
    fleet, a, b, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    router.poll(fleet)
    fleet.drain("a", 2.0)
    fleet.adopt({KEYS[0]: shares("b")}, (), 2.0)
    a.poll(fleet)
    assert a.assignment is not None
    assert not a.assignment.released
    assert named(fleet.table, KEYS[0]) == {"a"}
    b.settle(fleet, 2.0)
    a.poll(fleet)
    assert not a.assignment.released, "the router has not acknowledged yet"
    router.poll(fleet)
    router.report(fleet, 2.0)
    a.poll(fleet)
    assert a.assignment.released


def test_the_last_servers_and_a_closing_application_are_released_at_once() -> None:
    fleet, a, *_ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    fleet.drain("a", 2.0)
    fleet.drain("b", 2.0)
    found = fleet.assignment("a")
    assert found is not None
    assert found.released

    fleet, *_ = two_servers_and_a_router()
    fleet.close(1.0)
    found = fleet.assignment("b")
    assert found is not None
    assert found.released


def test_a_copy_that_fails_to_load_leaves_the_plan_and_is_blocked_for_a_while() -> None:
    fleet, a, b, _ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.poll(fleet)
    assert a.assignment is not None
    a.seq += 1
    fleet.report_server(
        "a", held=frozenset(), applied_version=a.assignment.version, seq=a.seq, now_s=1.0, failed=[KEYS[0]]
    )
    assert fleet.blocked == {(KEYS[0], "a")}
    assert KEYS[0] not in fleet.current
    a.poll(fleet)
    assert a.assignment.copies == ()
    for now_s in (20.0, 40.0):
        a.report(fleet, now_s)
        b.report(fleet, now_s)
        fleet.expire(now_s)
    assert not fleet.blocked


def test_a_restarted_fleet_waits_for_everyone_and_goes_above_every_epoch_in_use() -> None:
    old, a, b, router = two_servers_and_a_router()
    old.adopt({KEYS[0]: shares("a"), KEYS[1]: shares("b")}, (), 1.0)
    a.settle(old, 1.0)
    b.settle(old, 1.0)
    router.poll(old)
    used = router.table.epoch

    fleet = make_fleet()
    a.report(fleet, 10.0)
    assert not fleet.settled
    router.report(fleet, 10.0)
    assert fleet.epoch == 0, "b is known to the router and has not spoken"
    b.report(fleet, 10.1)
    assert fleet.settled
    assert fleet.epoch > used
    assert named(fleet.table, KEYS[0]) == {"a"}
    assert named(fleet.table, KEYS[1]) == {"b"}


def test_a_restarted_fleet_that_may_have_no_servers_waits_for_those_there_are() -> None:
    fleet, a, router = make_fleet(expected_servers=0), Server("a", held={KEYS[0]}, highest_epoch=7), Router("r")
    fleet.expire(10.0)
    assert not fleet.settled, "nobody has spoken"
    a.register(fleet, 10.1)
    assert not fleet.settled, "there may be others"
    fleet.expire(12.1)
    assert fleet.settled

    fresh = make_fleet(expected_servers=0)
    router.report(fresh, 10.0)
    assert fresh.settled, "a router without a table knows of no predecessor"


def test_an_expert_that_loses_its_copy_on_the_move_is_loaded_at_once() -> None:
    fleet = Fleet(num_experts=NUM_EXPERTS, expected_servers=2, copy_bytes=100, load_bytes_per_s=1.0)
    a, b = Server("a"), Server("b")
    for server in (a, b):
        server.register(fleet, 0.0)
    fleet.adopt({KEYS[0]: shares("a"), KEYS[1]: shares("a")}, (), 0.0)
    a.settle(fleet, 0.0)
    moves = [load(KEYS[1], "b", 0.9), load(KEYS[0], "b", 0.1)]
    fleet.adopt({KEYS[0]: shares("b"), KEYS[1]: shares("b")}, moves, 0.0)
    assert copies_of(fleet, "b") == {KEYS[1]}, "the other one waits for the budget"
    fleet.remove_server("a", 0.1)
    assert copies_of(fleet, "b") == {KEYS[0], KEYS[1]}


def test_new_shares_do_not_make_a_load_that_waits_for_the_budget_urgent_but_a_drain_does() -> None:
    fleet = Fleet(num_experts=NUM_EXPERTS, expected_servers=2, copy_bytes=100, load_bytes_per_s=1.0)
    a, b = Server("a"), Server("b")
    for server in (a, b):
        server.register(fleet, 0.0)
    fleet.adopt({key: shares("a") for key in KEYS[:3]}, (), 0.0)
    a.settle(fleet, 0.0)
    fleet.adopt({key: shares("a", "b") for key in KEYS[:3]}, [load(key, "b", 0.1) for key in KEYS[:3]], 0.0)
    assert len(copies_of(fleet, "b")) == 1
    uneven = (CopyShare(server_id="a", share=0.9), CopyShare(server_id="b", share=0.1))
    fleet.adopt(dict.fromkeys(KEYS[:3], uneven), (), 0.1)
    assert len(copies_of(fleet, "b")) == 1
    fleet.drain("a", 0.2)
    assert copies_of(fleet, "b") == set(KEYS[:3])


def test_a_cold_expert_does_not_hold_back_a_leaving_server() -> None:
    fleet, a, b, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a"), KEYS[1]: shares("b")}, (), 1.0)
    a.settle(fleet, 1.0)
    b.settle(fleet, 1.0)
    fleet.drain("a", 2.0)
    fleet.adopt({KEYS[1]: shares("b")}, [Unload(key=KEYS[0], server_id="a", reason="drain")], 2.0)
    router.poll(fleet)
    router.report(fleet, 2.0)
    a.poll(fleet)
    assert a.assignment is not None
    assert a.assignment.released
    assert KEYS[0] not in fleet.table.copies


def test_a_restarted_fleet_does_not_wait_for_the_dead() -> None:
    fleet, a = make_fleet(), Server("a", held={KEYS[0]}, highest_epoch=7)
    a.register(fleet, 10.0)
    fleet.expire(11.9)
    assert not fleet.settled
    a.report(fleet, 12.0)
    assert fleet.settled
    assert fleet.epoch == 8


def test_a_copy_asked_for_again_counts_only_once_its_unload_is_over() -> None:
    fleet, a, b, router = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    a.settle(fleet, 1.0)
    fleet.adopt({KEYS[0]: shares("b")}, (), 1.0)
    b.settle(fleet, 1.0)
    router.poll(fleet)
    router.report(fleet, 1.0)
    a.ask(fleet)  # the answer says: unload
    fleet.adopt({KEYS[0]: shares("a", "b")}, (), 1.0)
    a.report(fleet, 1.0)
    assert named(fleet.table, KEYS[0]) == {"b"}, "a still holds it, but has an unload on its way"
    a.receive()
    a.step()
    assert not a.held
    a.settle(fleet, 1.0)
    assert named(fleet.table, KEYS[0]) == {"a", "b"}


def test_a_late_heartbeat_changes_nothing() -> None:
    fleet, a, *_ = two_servers_and_a_router()
    fleet.adopt({KEYS[0]: shares("a")}, (), 1.0)
    late = a.seq + 1
    a.seq += 1
    a.settle(fleet, 1.0)
    fleet.report_server("a", held=frozenset(), applied_version=0, seq=late, now_s=1.1)
    assert named(fleet.table, KEYS[0]) == {"a"}


@pytest.mark.parametrize("expected", [1, 2, 3])
def test_a_fresh_fleet_waits_for_the_expected_servers(expected: int) -> None:
    fleet = make_fleet(expected_servers=expected)
    for index in range(expected):
        assert not fleet.settled
        Server(f"s{index}").register(fleet, 0.0)
    assert fleet.settled


class World:
    """Random interleavings. Messages may be acted on late: servers and routers poll, work and report separately."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.fleet = self.make_fleet()
        self.servers: dict[str, Server] = {}
        self.routers = [Router("r0"), Router("r1")]
        self.spawned = 0

    def make_fleet(self) -> Fleet:
        """One that may pace its loads: so many copies per second, of a hundred actions per second."""
        pace = self.rng.choice([None, 20.0, 7.0])
        return Fleet(num_experts=NUM_EXPERTS, dead_after_s=3.0, settle_s=2.0, copy_bytes=1, load_bytes_per_s=pace)

    def live_servers(self) -> list[Server]:
        return list(self.servers.values())

    def act(self, action: str) -> None:
        self.now_s += 0.01
        server = self.rng.choice(self.live_servers()) if self.servers else None
        router = self.rng.choice(self.routers)
        if action == "join":
            joining = Server(f"s{self.spawned}")
            self.spawned += 1
            self.servers[joining.server_id] = joining
            joining.register(self.fleet, self.now_s)
        elif action == "plan":
            ids = [held.server_id for held in self.live_servers()]
            target = {key: shares(*self.rng.sample(ids, self.rng.randint(1, min(2, len(ids))))) for key in KEYS if ids}
            loads = [load(key, copy.server_id, self.rng.random()) for key in KEYS for copy in target.get(key, ())]
            self.fleet.adopt(target, loads[self.rng.randint(0, 2) :], self.now_s)
        elif action == "batch":
            router.in_use.append(router.table)
        elif action == "done" and router.in_use:
            router.in_use.pop(self.rng.randrange(len(router.in_use)))
        elif action == "ack":
            router.report(self.fleet, self.now_s)
        elif action == "fetch":
            router.poll(self.fleet)
        elif action == "restart":
            self.fleet = self.make_fleet()
            # The shells register by themselves; a restarted fleet publishes only when all it knows have spoken.
            for waiting in self.routers:
                waiting.report(self.fleet, self.now_s)
            for held in self.live_servers():
                held.report(self.fleet, self.now_s)
            if self.fleet.settled:
                assert self.fleet.epoch > max(each.table.epoch for each in self.routers)
        elif server is not None:
            if action == "ask":
                server.ask(self.fleet)
            elif action == "receive":
                server.receive()
            elif action == "step":
                server.step()
            elif action == "report":
                server.report(self.fleet, self.now_s)
            elif action == "drain":
                self.fleet.drain(server.server_id, self.now_s)
            elif action == "stop":
                found = self.fleet.assignment(server.server_id)
                alone = {held.server_id for held in self.fleet.servers} <= self.fleet.draining
                if found is not None and found.released and not alone:
                    for used in [table for each in self.routers for table in (each.table, *each.in_use)]:
                        assert all(server.server_id not in named(used, key) for key in KEYS)
                    self.fleet.remove_server(server.server_id, self.now_s)
                    del self.servers[server.server_id]
            elif action == "die" and len(self.servers) > 1:
                del self.servers[server.server_id]
                self.fleet.remove_server(server.server_id, self.now_s)

    def check(self, before: PlacementTable) -> None:
        assert self.fleet.epoch >= before.epoch
        for key, copies in before.copies.items():
            if any(copy.server_id in self.servers for copy in copies):
                assert self.fleet.table.copies.get(key), "an expert with a live copy left the table"
        observed = {server.server_id: server.held for server in self.live_servers()}
        for key in KEYS:
            for copy in self.fleet.table.copies.get(key, ()):
                assert key in observed[copy.server_id], "the table names a copy that is not loaded"
            if self.fleet.table.copies.get(key):
                assert sum(copy.share for copy in self.fleet.table.copies[key]) == pytest.approx(1)
        for router in self.routers:
            for table in (router.table, *router.in_use):
                for key in KEYS:
                    for copy in table.copies.get(key, ()):
                        if copy.server_id in observed:
                            assert key in observed[copy.server_id], "unloaded while a router may still use it"


ACTIONS = ["join", "plan", "ask", "receive", "step", "report", "batch", "done", "ack", "fetch", "drain", "stop", "die"]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), actions=st.lists(st.sampled_from(ACTIONS * 3 + ["restart"]), max_size=120))
def test_no_interleaving_breaks_the_rules(seed: int, actions: list[str]) -> None:
    world = World(seed)
    world.act("join")
    for router in world.routers:
        router.report(world.fleet, 0.0)
    for action in actions:
        before = world.fleet.table if action != "restart" else empty_table(NUM_EXPERTS)
        world.act(action)
        world.check(before)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), actions=st.lists(st.sampled_from(ACTIONS), max_size=60))
def test_once_quiet_the_table_reaches_the_plan(seed: int, actions: list[str]) -> None:
    world = World(seed)
    world.act("join")
    for action in [*actions, "join", "plan"]:
        world.act(action)
    serving = [held.server_id for held in world.fleet.servers if held.server_id not in world.fleet.draining]
    target = {key: shares(world.rng.choice(serving)) for key in KEYS}
    world.fleet.adopt(target, (), world.now_s)
    for _ in range(4):
        world.now_s += 0.5
        for server in world.live_servers():
            server.settle(world.fleet, world.now_s)
        for router in world.routers:
            router.in_use.clear()
            router.poll(world.fleet)
            router.report(world.fleet, world.now_s)
    assert dict(world.fleet.table.copies) == target
    for server in world.live_servers():
        server.settle(world.fleet, world.now_s)
        assert server.held == {key for key in KEYS if server.server_id in named(world.fleet.table, key)}
