"""Who is in the cluster, which copies live where, and which table the routers get: a state machine without I/O.

A copy is *planned* (in the target), *requested* (in its server's assignment), *observed* (its server reported it
loaded). Make before break, in three rules:

1. The table names only observed copies. An expert keeps its old copies until all copies of its target are observed.
2. A copy that left the table at epoch e leaves its server's assignment once every live router uses e or later.
3. Epochs only grow, also across a restart of this state: what routers and servers report raises the floor.

The state is soft. After a restart servers register with what they hold and routers with the epoch they use; until
everyone known has spoken (or `settle_s` is over) nothing is published, planned or unloaded.
Time is an argument everywhere (`now_s`, monotonic seconds). After an event, callers compare `revision`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from cluster.loads import LoadQueue
from cluster.members import Router, Server
from cluster.messages import Assignment, Key, ServerHello
from cluster.routable import routable
from cluster.steps import Load, Step, Unload
from router.table import CopyShare, PlacementTable, ServerAddress, empty_table


class Fleet:
    """Membership, copies and epochs.

    Args:
        num_experts: E, for the table.
        expected_servers: how many servers a fresh cluster waits for before it is planned.
        dead_after_s: silence after which a server or router is gone.
        settle_s: longest wait for the others after the first one spoke.
        retry_load_s: pause before a copy that failed to load is tried on the same server again.
        copy_bytes: memory of one copy, for the budget.
        load_bytes_per_s: how much may be loaded per second, over all servers, to improve the placement; None: no limit.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        expected_servers: int = 1,
        dead_after_s: float = 3.0,
        settle_s: float = 2.0,
        retry_load_s: float = 30.0,
        copy_bytes: int = 0,
        load_bytes_per_s: float | None = None,
    ) -> None:
        self.settled = False
        self._expected = expected_servers
        self._dead_after_s = dead_after_s
        self._settle_s = settle_s
        self._retry_load_s = retry_load_s
        self.copy_bytes = copy_bytes
        self._queue = LoadQueue(load_bytes_per_s)
        self._first_seen_s: float | None = None
        self._floor = 0  # every epoch we publish is above this: a predecessor may have used it
        self._servers: dict[str, Server] = {}
        self._routers: dict[str, Router] = {}
        self._target: dict[Key, tuple[CopyShare, ...]] = {}
        self._requested: dict[Key, set[str]] = {}  # servers whose assignment has the copy
        self._holders: dict[Key, set[str]] = {}  # servers where it is observed
        self._table = empty_table(num_experts)
        self._dirty: set[Key] = set()
        self._let_go: set[Key] = set()  # experts that lose their last copy, on purpose
        self._closing = False
        self._overtaken = 0

    # What the outside reads.

    @property
    def epoch(self) -> int:
        return self._table.epoch

    @property
    def table(self) -> PlacementTable:
        return self._table

    @property
    def revision(self) -> tuple[int, ...]:
        """Changes with the table, with any assignment and when the fleet has settled."""
        return (self._table.epoch, self.settled, *(server.version for server in self._servers.values()))

    @property
    def servers(self) -> tuple[ServerHello, ...]:
        return tuple(server.hello for server in self._servers.values())

    @property
    def routers(self) -> tuple[str, ...]:
        return tuple(self._routers)

    @property
    def current(self) -> Mapping[Key, tuple[CopyShare, ...]]:
        """Copies that exist or were asked for, for the planner: the target, else what is observed."""
        observed = {
            key: tuple(CopyShare(server_id=held, share=1 / len(holders)) for held in sorted(holders))
            for key, holders in self._holders.items()
            if holders and not self._target.get(key) and key not in self._let_go
        }
        return {key: copies for key, copies in self._target.items() if copies} | observed

    @property
    def blocked(self) -> frozenset[tuple[Key, str]]:
        """Copies that lately failed to load, not to be planned there."""
        return frozenset((key, sid) for sid, server in self._servers.items() for key in server.failed)

    @property
    def outstanding(self) -> int:
        """Copies that are planned or asked for and not observed."""
        return len(self._queue) + sum(server.loading for server in self._servers.values())

    def loading(self, server_id: str) -> int:
        """Copies a server was asked for and has not reported."""
        return self._servers[server_id].loading

    def pop_overtaken(self) -> int:
        """Loads that newer plans made needless before they were done, since the last call."""
        count, self._overtaken = self._overtaken, 0
        return count

    @property
    def draining(self) -> frozenset[str]:
        return frozenset(server_id for server_id, server in self._servers.items() if server.draining)

    def last_seen_s(self, server_id: str) -> float | None:
        """When the server was last heard, None if it is not a member."""
        server = self._servers.get(server_id)
        return None if server is None else server.last_seen_s

    def version(self, server_id: str) -> int | None:
        """Of the server's assignment."""
        server = self._servers.get(server_id)
        return None if server is None else server.version

    def assignment(self, server_id: str) -> Assignment | None:
        """What the server is to hold now; None if it has to register (again)."""
        server = self._servers.get(server_id)
        if server is None:
            return None
        return server.assignment(self._sources)

    # Events.

    def register(
        self, hello: ServerHello, *, held: frozenset[Key], highest_epoch: int, seq: int, now_s: float
    ) -> Assignment:
        """A server process joins, or rejoins after silence or a restart of this state; what it holds is kept."""
        before = self._servers.get(hello.server_id)
        version = before.version + 1 if before else 1
        if before:
            self._forget(hello.server_id)
        server = Server(hello=hello, last_seen_s=now_s, version=version, applied=version, seq=seq)
        server.draining = hello.draining or (before is not None and before.draining)
        self._servers[hello.server_id] = server
        for key in sorted(held):
            self._request(server, key)
        self._observe(server, held)
        self._raise_floor(highest_epoch)
        self._advance(now_s)
        found = self.assignment(hello.server_id)
        assert found is not None
        return found

    def report_server(
        self,
        server_id: str,
        *,
        held: frozenset[Key],
        applied_version: int,
        seq: int,
        now_s: float,
        failed: Iterable[Key] = (),
    ) -> bool:
        """A server's heartbeat. `failed`: copies it was asked for and could not load. False: it has to register."""
        server = self._servers.get(server_id)
        if server is None:
            return False
        if seq > server.seq:
            server.seq = seq
            server.last_seen_s = now_s
            server.applied = max(server.applied, applied_version)
            for key in failed:
                self._give_up(server, key, now_s)
            self._observe(server, held)
        self._advance(now_s)
        return True

    def report_router(
        self, router_id: str, *, epoch: int, oldest_epoch: int, known_servers: frozenset[str], now_s: float
    ) -> None:
        """A router's heartbeat: the epoch it uses for new batches and the oldest one still in use (its ack)."""
        router = self._routers.get(router_id)
        if router is None or epoch > self.epoch:
            self._raise_floor(epoch)
        if router is None:
            oldest = oldest_epoch if epoch else self.epoch  # one without a table cannot use an older one any more
            self._routers[router_id] = Router(epoch=epoch, oldest=oldest, last_seen_s=now_s, known=known_servers)
        else:
            router.epoch = max(router.epoch, epoch)
            router.oldest = max(router.oldest, oldest_epoch)
            router.last_seen_s = now_s
            router.known = known_servers
        self._advance(now_s)

    def drain(self, server_id: str, now_s: float) -> None:
        """The server wants to leave: its copies move away, then its assignment says `released`."""
        if server := self._servers.get(server_id):
            server.draining, leaving = True, self.draining | {server_id}
            self._queue.urge(key for key in server.live if self._holders[key] <= leaving)
            self._advance(now_s)

    def remove_server(self, server_id: str, now_s: float) -> None:
        """The server is gone: stopped, or confirmed dead."""
        if server_id in self._servers:
            self._forget(server_id)
            self._advance(now_s)

    def remove_router(self, router_id: str, now_s: float) -> None:
        self._routers.pop(router_id, None)
        self._advance(now_s)

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Drop members that have been silent for `dead_after_s`; returns the ids of lost servers."""
        deadline_s = now_s - self._dead_after_s
        lost = tuple(sid for sid, server in self._servers.items() if server.last_seen_s < deadline_s)
        for server_id in lost:
            self._forget(server_id)
        for router_id in [rid for rid, router in self._routers.items() if router.last_seen_s < deadline_s]:
            del self._routers[router_id]
        for server in self._servers.values():
            for key in [key for key, until_s in server.failed.items() if until_s <= now_s]:
                del server.failed[key]
        self._advance(now_s)
        return lost

    def adopt(self, target: Mapping[Key, tuple[CopyShare, ...]], steps: Sequence[Step], now_s: float) -> None:
        """Pursue a new plan instead of the last one.

        Args:
            target: copies on unknown servers are ignored.
            steps: what is known of the target's new copies; without one a copy keeps its turn, or is missing. An expert
                loses its last copy if a step takes it for memory or because its server leaves.
        """
        old = self._target
        self._target = {
            key: tuple(copy for copy in copies if copy.server_id in self._servers) for key, copies in target.items()
        }
        changed = {key for key in old.keys() | target.keys() if self._target.get(key, ()) != old.get(key, ())}
        known = {(step.key, step.server_id): step for step in steps if isinstance(step, Load)}
        given_up = {step.key for step in steps if isinstance(step, Unload) and step.reason in ("memory", "drain")}
        self._let_go = {key for key in self._let_go | given_up if self._holders.get(key) and not target.get(key)}
        for key in sorted(changed):
            wanted = {copy.server_id for copy in self._target.get(key, ())}
            for server_id in {copy.server_id for copy in old.get(key, ())} - wanted:
                self._overtaken += self._queue.discard(key, server_id)
            for server_id in sorted(wanted - self._requested.get(key, set())):
                self._queue.want(key, server_id, known.get((key, server_id)))
        self._dirty |= changed | self._let_go
        self._advance(now_s)

    def close(self, now_s: float) -> None:
        """The application is going away: every server may stop at once."""
        self._closing = True
        self._advance(now_s)

    # The rules.

    def _advance(self, now_s: float) -> None:
        self._settle(now_s)
        if self.settled:
            self._publish()
            oldest = min((router.oldest for router in self._routers.values()), default=math.inf)
            for server in self._servers.values():
                self._unassign(server, oldest)
            self._assign(now_s)
        for server in self._servers.values():
            released = self._is_released(server)
            server.version += released != server.released
            server.released = released

    def _settle(self, now_s: float) -> None:
        if self.settled or (not self._servers and self._expected):
            return
        if self._first_seen_s is None:
            self._first_seen_s = now_s
        known = frozenset[str]().union(*(router.known for router in self._routers.values()))
        if self._floor:  # a restart: wait for everyone the routers know
            complete = bool(known) and known <= self._servers.keys()
        else:  # a router without a table says that there was no predecessor
            complete = len(self._servers) >= self._expected if self._expected else bool(self._routers)
        self.settled = complete or now_s - self._first_seen_s >= self._settle_s
        if self.settled:
            self._dirty |= self._holders.keys()

    def _publish(self) -> None:
        old, dirty, self._dirty = self._table.copies, self._dirty, set()
        stuck = {server_id for server_id, server in self._servers.items() if server.lets_go}
        live = {key: self._holders.get(key, set()) if key not in self._let_go else set() for key in dirty}
        named = {key: routable(self._target.get(key, ()), live[key], stuck) for key in dirty}  # rule 1
        changes = {key: copies for key, copies in named.items() if copies != old.get(key, ())}
        listed = {server.server_id for server in self._table.servers}
        if changes or listed != self._servers.keys() or self._table.epoch <= self._floor:
            self._table = PlacementTable(
                epoch=max(self._table.epoch, self._floor) + 1,  # rule 3
                servers=tuple(
                    ServerAddress(server_id=server_id, address=server.hello.address)
                    for server_id, server in self._servers.items()
                ),
                copies={key: copies for key, copies in {**old, **changes}.items() if copies},
                num_experts=self._table.num_experts,
            )
        for key, copies in named.items():
            kept = {copy.server_id for copy in (*copies, *self._target.get(key, ()))}
            for server_id in self._requested.get(key, set()):
                if server_id in kept:
                    self._servers[server_id].retiring.pop(key, None)
                else:
                    server = self._servers[server_id]
                    # What was never observed is in no table: a newer plan takes it back at once.
                    self._overtaken += key not in server.live and key not in server.retiring
                    server.retiring.setdefault(key, self._table.epoch if key in server.live else 0)

    def _unassign(self, server: Server, oldest: float) -> None:
        drop = [key for key, epoch in server.retiring.items() if epoch <= oldest]  # rule 2
        for key in drop:
            self._unrequest(server, key)
        server.version += bool(drop)

    def _assign(self, now_s: float) -> None:
        room = {server_id: server.room for server_id, server in self._servers.items()}
        taken = self._queue.take(room, self.copy_bytes, now_s)
        for server_id in {server_id for server_id, _ in taken}:
            self._servers[server_id].version += 1
        for server_id, key in taken:
            self._request(self._servers[server_id], key)
        for server_id, server in self._servers.items():
            if server.look_stuck(self._queue.waiting(server_id), now_s):
                self._dirty |= server.live

    def _request(self, server: Server, key: Key) -> None:
        server.assigned[key] = server.version
        self._requested.setdefault(key, set()).add(server.hello.server_id)

    def _unrequest(self, server: Server, key: Key) -> None:
        del server.assigned[key]
        server.retiring.pop(key, None)
        server.live.discard(key)
        self._requested[key].discard(server.hello.server_id)
        self._holders.get(key, set()).discard(server.hello.server_id)

    def _sources(self, key: Key) -> tuple[str, ...]:
        """Where a copy can be fetched from. Which holder comes first turns with the key: no server serves them all."""
        holders = sorted(self._holders.get(key, ()))
        first = (key[1] % len(holders)) if holders else 0
        return tuple(self._servers[held].hello.address for held in holders[first:] + holders[:first])

    def _is_released(self, server: Server) -> bool:
        if self._closing or not server.draining:
            return self._closing
        if all(other.draining for other in self._servers.values()):
            return True  # nobody is left to take over
        return self.settled and not server.live and not server.retiring

    def _observe(self, server: Server, held: frozenset[Key]) -> None:
        live = {key for key in held & server.assigned.keys() if server.applied >= server.assigned[key]}
        if live == server.live:
            return
        for key in live ^ server.live:
            holders = self._holders.setdefault(key, set())
            (holders.add if key in live else holders.discard)(server.hello.server_id)
            self._dirty.add(key)
        server.live = live

    def _give_up(self, server: Server, key: Key, now_s: float) -> None:
        server.failed[key] = now_s + self._retry_load_s
        if key in server.assigned and key not in server.live:
            self._unrequest(server, key)
            server.version += 1
            self._untarget(key, server.hello.server_id)

    def _untarget(self, key: Key, server_id: str) -> None:
        self._target[key] = tuple(copy for copy in self._target.get(key, ()) if copy.server_id != server_id)
        self._dirty.add(key)

    def _forget(self, server_id: str) -> None:
        server = self._servers.pop(server_id)
        held = frozenset(server.live)
        self._dirty |= held
        self._queue.drop_server(server_id)
        for key in list(server.assigned):
            self._unrequest(server, key)
        for key in [key for key, copies in self._target.items() if any(c.server_id == server_id for c in copies)]:
            self._untarget(key, server_id)
        self._queue.urge(key for key in held if not self._holders.get(key))

    def _raise_floor(self, epoch: int) -> None:
        # A newcomer's epoch that is not below ours may be a predecessor's, with other contents: go above it.
        if epoch >= self._table.epoch:
            self._floor = max(self._floor, epoch)
