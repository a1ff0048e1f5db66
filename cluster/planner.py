"""What lives where: from load, servers and the current copies to target copies and steps. A pure function.

First version, greedy, layer by layer (the layers of a model run one after the other, so each is balanced by itself):

1. every expert gets its `min_copies`, the most loaded first, on the least loaded server with room;
2. an expert whose copies carry more than `hot_factor` times the mean expert of its layer gets more copies, in free
   bytes. That mean is the unit the capacity factor counts in (arXiv:2101.03961): a copy at `hot_factor` = 1.25
   overflows as little as a perfectly even expert at capacity factor 1.25;
3. surplus copies go once fewer copies would each stay below `cool_factor` times the mean;
4. single copies move from the most to the least loaded server while that pays;
5. the shares of several copies are set by water-filling, so that the servers' loads even out.

The gap between `hot_factor` and `cool_factor`, the smallest gain of a move, and keeping shares that are good enough
make the plan steady under noise and idempotent at rest. Unlike EPLB (deepseek-ai/EPLB) servers may hold unequal
numbers of experts per layer, and a re-plan changes only what pays.

Shapes: L layers, E experts, S servers that may hold copies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.messages import Key
from cluster.steps import Load, Reshare, Step, Unload
from router.table import CopyShare

_MIN_SHARE = 0.02  # of one copy, so that it stays warm and its speed known
_HOT_MARGIN = 1.15  # copies are added from this much above hot_factor: noise around it adds none
_SHARE_TOLERANCE = 0.1  # keep shares whose largest server load is at most this much above the best


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerServer:
    """A server that copies may live on. `max_copies` is what fits into its byte budget; `speed` is relative."""

    server_id: str
    max_copies: int
    speed: float = 1.0
    draining: bool = False  # keeps its copies until others hold them, gets no new ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannerInput:
    """Everything a plan depends on.

    Args:
        layers: names, in the order of load_LE's rows.
        load_LE: routed pairs per second that the gate demands of each expert.
        servers: the live ones.
        current: copies that exist or are being loaded; servers not in `servers` are ignored.
        blocked: copies that must not be placed there (they failed to load).
        min_copies: live copies every expert should have.
        max_copies: most copies of one expert; None: one per server.
        max_moves: loads that only improve balance, per plan; re-placing what is missing is never limited.
        hot_factor, cool_factor: see the module docstring.
        imbalance: a layer is rebalanced when its most loaded server is this many times above the mean.
        min_pairs_per_s: layers with less load carry no information about heat: their copies stay as they are.
    """

    layers: tuple[str, ...]
    load_LE: npt.NDArray[np.float64]
    servers: tuple[PlannerServer, ...]
    current: Mapping[Key, tuple[CopyShare, ...]]
    blocked: frozenset[tuple[Key, str]] = frozenset()
    min_copies: int = 1
    max_copies: int | None = None
    max_moves: int = 16
    hot_factor: float = 1.5
    cool_factor: float = 1.2
    imbalance: float = 1.2
    min_pairs_per_s: float = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The target copies with their shares (the shares of one expert sum to 1), and how to get there.

    Args:
        copies: every expert that has a place; copies on draining servers are not in it.
        steps: loads most urgent first, then unloads, then reshares.
        missing: experts without a place for lack of memory, most loaded first.
        wanted_copies: copies that hot experts were denied for lack of memory.
    """

    copies: Mapping[Key, tuple[CopyShare, ...]]
    steps: tuple[Step, ...]
    missing: tuple[Key, ...] = ()
    wanted_copies: int = 0


def plan(inputs: PlannerInput) -> Plan:
    """The next plan."""
    draft = _Draft(inputs)
    draft.place_missing()
    draft.drop_cooled()
    draft.copy_hot()
    draft.rebalance()
    return draft.finish()


def balancedness(
    load_E: npt.NDArray[np.float64], copies: Mapping[int, tuple[CopyShare, ...]], num_servers: int
) -> float:
    """Mean over maximum server load of one layer, 1 at best; 1 for a layer without load."""
    loads: dict[str, float] = {}
    for expert, held in copies.items():
        for copy in held:
            loads[copy.server_id] = loads.get(copy.server_id, 0.0) + copy.share * float(load_E[expert])
    most = max(loads.values(), default=0.0)
    return sum(loads.values()) / num_servers / most if most else 1.0


class _Draft:
    """A plan in the making: holders and shares per expert, loads and free room per server."""

    def __init__(self, inputs: PlannerInput) -> None:
        self.inputs = inputs
        active = [server for server in inputs.servers if not server.draining]
        self.ids = [server.server_id for server in active]
        self.index = {server_id: s for s, server_id in enumerate(self.ids)}
        self.speed_S = np.array([server.speed for server in active], dtype=np.float64)
        self.free_S = np.array([server.max_copies for server in active], dtype=np.int64)
        self.num_servers = len(active)
        self.max_copies = min(inputs.max_copies or self.num_servers, self.num_servers)
        self.missing: list[Key] = []
        self.wanted = 0
        self.moves_left = inputs.max_moves
        self.urgent: list[tuple[Key, int]] = []

        # What is balanced: the load, plus a little for every expert so that idle ones spread out as well.
        mean_L = inputs.load_LE.mean(axis=1)
        self.idle_L = inputs.load_LE.sum(axis=1) < inputs.min_pairs_per_s
        base_L = np.where(self.idle_L, 1.0, 0.02 * mean_L)
        self.weight_LE = np.where(self.idle_L[:, None], 0.0, inputs.load_LE) + base_L[:, None]
        self.mean_L = self.weight_LE.mean(axis=1)

        self.shares: list[list[dict[int, float]]] = []  # [layer][expert] -> server index -> share
        self.load_LS = np.zeros((len(inputs.layers), self.num_servers))
        for row, layer in enumerate(inputs.layers):
            held_E: list[dict[int, float]] = []
            for expert in range(inputs.load_LE.shape[1]):
                held: dict[int, float] = {}
                for copy in inputs.current.get((layer, expert), ()):
                    s = self.index.get(copy.server_id)
                    if s is not None:
                        held[s] = copy.share
                        self.free_S[s] -= 1
                total = sum(held.values())
                if held and abs(total - 1) > 1e-9:
                    held = {s: share / total for s, share in held.items()}
                held_E.append(held)
                for s, share in held.items():
                    self.load_LS[row, s] += share * self.weight_LE[row, expert]
            self.shares.append(held_E)
        self.newcomer_S = self.free_S == [server.max_copies for server in active]
        self.total_S = (self.load_LS / self.mean_L[:, None]).sum(axis=0)  # in units of a mean expert

    def place_missing(self) -> None:
        """Rule 1. Without room, surplus copies of other experts give way."""
        want = min(self.inputs.min_copies, self.num_servers)
        for have in range(self.inputs.min_copies):
            lacking = [
                (-self.weight_LE[row, expert] / self.mean_L[row], row, expert)
                for row, held_E in enumerate(self.shares)
                for expert, held in enumerate(held_E)
                if len(held) == have
            ]
            for _, row, expert in sorted(lacking):
                s = self._best_server(row, expert) if have < want else None
                if s is None and have < want:
                    s = self._make_room(row, expert)
                if s is None:
                    if have == 0:
                        self.missing.append(self._key(row, expert))
                    continue
                self._add(row, expert, s)
                self.urgent.append((self._key(row, expert), s))

    def drop_cooled(self) -> None:
        """Rule 3: at most one copy of an expert per plan, from its most loaded server."""
        for row, held_E in enumerate(self.shares):
            if self.idle_L[row]:
                continue
            for expert, held in enumerate(held_E):
                if len(held) <= self.inputs.min_copies:
                    continue
                if self.weight_LE[row, expert] / (len(held) - 1) < self.inputs.cool_factor * self.mean_L[row]:
                    self._remove(row, expert, max(held, key=lambda s: (self._relative(row, s), s)))

    def copy_hot(self) -> None:
        """Rule 2, the hottest first."""
        limit_L = self.inputs.hot_factor * self.mean_L
        hot = [
            (-self.weight_LE[row, expert] / self.mean_L[row], row, expert)
            for row in np.flatnonzero(~self.idle_L).tolist()
            for expert in np.flatnonzero(self.weight_LE[row] > limit_L[row]).tolist()
        ]
        for _, row, expert in sorted(hot):
            have = len(self.shares[row][expert])
            need = min(math.ceil(self.weight_LE[row, expert] / limit_L[row] - 1e-9), self.max_copies)
            if not have or self.weight_LE[row, expert] <= _HOT_MARGIN * have * limit_L[row]:
                continue
            for missing in range(need - have, 0, -1):
                if not self.moves_left:
                    return
                s = self._best_server(row, expert)
                if s is None:
                    self.wanted += missing
                    break
                self._add(row, expert, s)
                self.moves_left -= 1

    def rebalance(self) -> None:
        """Rules 4 and 5, alternating until nothing pays: shares change what a move is worth, and the reverse."""
        for row in range(len(self.shares)):
            for _ in range(4):
                self._even_shares(row)
                if not self._move_singles(row):
                    break

    def finish(self) -> Plan:
        copies: dict[Key, tuple[CopyShare, ...]] = {}
        loads: list[Load] = []
        unloads: list[Unload] = []
        reshares: list[Reshare] = []
        urgent = {(key, self.ids[s]): place for place, (key, s) in enumerate(self.urgent)}
        for row, held_E in enumerate(self.shares):
            for expert, held in enumerate(held_E):
                key = self._key(row, expert)
                before = self.inputs.current.get(key, ())
                old = {copy.server_id: copy.share for copy in before}
                new = {self.ids[s]: share for s, share in sorted(held.items())}
                if new:
                    copies[key] = (
                        before
                        if new == old
                        else tuple(CopyShare(server_id=server_id, share=share) for server_id, share in new.items())
                    )
                loads += [
                    Load(key=key, server_id=server_id, reason="missing" if (key, server_id) in urgent else "load")
                    for server_id in new.keys() - old.keys()
                ]
                unloads += [Unload(key=key, server_id=server_id) for server_id in old.keys() - new.keys() if new]
                if new != old and new.keys() == old.keys():
                    reshares.append(Reshare(key=key))
        last = len(urgent)
        loads.sort(key=lambda step: (urgent.get((step.key, step.server_id), last), step.key, step.server_id))
        return Plan(
            copies=copies,
            steps=(*loads, *sorted(unloads, key=lambda step: (step.key, step.server_id)), *reshares),
            missing=tuple(self.missing),
            wanted_copies=self.wanted,
        )

    def _key(self, row: int, expert: int) -> Key:
        return self.inputs.layers[row], expert

    def _relative(self, row: int, s: int) -> float:
        return float(self.load_LS[row, s] / self.speed_S[s])

    def _best_server(self, row: int, expert: int) -> int | None:
        """The server with room where the expert hurts least: by load in its layer, then over all layers."""
        if not self.num_servers:
            return None
        cost_S = (self.load_LS[row] / self.mean_L[row] + 0.05 * self.total_S) / self.speed_S
        cost_S[self.free_S <= 0] = math.inf
        for s in self.shares[row][expert]:
            cost_S[s] = math.inf
        if self.inputs.blocked:
            for s, server_id in enumerate(self.ids):
                if (self._key(row, expert), server_id) in self.inputs.blocked:
                    cost_S[s] = math.inf
        s = int(cost_S.argmin())
        return s if math.isfinite(cost_S[s]) else None

    def _make_room(self, row: int, expert: int) -> int | None:
        """Evict the surplus copy that carries least from a server that may take the expert."""
        surplus = [
            (self.weight_LE[r, e] / len(held) / self.mean_L[r], r, e, s)
            for r, held_E in enumerate(self.shares)
            for e, held in enumerate(held_E)
            if len(held) > self.inputs.min_copies
            for s in held
            if s not in self.shares[row][expert] and (self._key(row, expert), self.ids[s]) not in self.inputs.blocked
        ]
        if not surplus:
            return None
        _, r, e, s = min(surplus)
        self._remove(r, e, s)
        return s

    def _add(self, row: int, expert: int, s: int) -> None:
        held = self.shares[row][expert]
        share = 1 / (len(held) + 1)
        self._set_shares(row, expert, {other: old * (1 - share) for other, old in held.items()} | {s: share})
        self.free_S[s] -= 1

    def _remove(self, row: int, expert: int, s: int) -> None:
        rest = {other: share for other, share in self.shares[row][expert].items() if other != s}
        total = sum(rest.values())
        self._set_shares(row, expert, {other: share / total for other, share in rest.items()})
        self.free_S[s] += 1

    def _set_shares(self, row: int, expert: int, shares: dict[int, float]) -> None:
        weight = self.weight_LE[row, expert]
        for sign, held in ((-1, self.shares[row][expert]), (1, shares)):
            for s, share in held.items():
                self.load_LS[row, s] += sign * share * weight
                self.total_S[s] += sign * share * weight / self.mean_L[row]
        self.shares[row][expert] = shares

    def _even_shares(self, row: int) -> None:
        """Rule 5 for one layer: Gauss-Seidel over its experts with several copies; kept only if clearly better."""
        several = [expert for expert, held in enumerate(self.shares[row]) if len(held) > 1]
        if not several:
            return
        before = [self.shares[row][expert] for expert in several]
        worst_before = float((self.load_LS[row] / self.speed_S).max())
        for _ in range(3):
            for expert in several:
                self._set_shares(row, expert, self._fill(row, expert))
        if worst_before <= (1 + _SHARE_TOLERANCE) * float((self.load_LS[row] / self.speed_S).max()):
            for expert, shares in zip(several, before, strict=True):
                self._set_shares(row, expert, shares)

    def _fill(self, row: int, expert: int) -> dict[int, float]:
        """Shares of one expert that even out its servers' loads (per speed) as far as its own load can."""
        weight = float(self.weight_LE[row, expert])
        old = self.shares[row][expert]
        servers = sorted(old, key=lambda s: (self.load_LS[row, s] - old[s] * weight) / self.speed_S[s])
        base = {s: float(self.load_LS[row, s]) - old[s] * weight for s in servers}
        level, speed, filled = 0.0, 0.0, 0.0
        for place, s in enumerate(servers):  # raise the water until the weight is used up
            speed += float(self.speed_S[s])
            filled += base[s]
            level = (weight + filled) / speed
            if place + 1 == len(servers):
                break
            following = servers[place + 1]
            if level <= base[following] / self.speed_S[following]:
                break
        part = {s: max(level * float(self.speed_S[s]) - base[s], _MIN_SHARE * weight) for s in servers}
        total = sum(part.values())
        return {s: amount / total for s, amount in part.items()}

    def _move_singles(self, row: int) -> bool:
        """Rule 4 for one layer; True if anything moved."""
        moved = False
        while self.moves_left and self.num_servers > 1:
            relative_S = self.load_LS[row] / self.speed_S
            mean = float(self.load_LS[row].sum() / self.speed_S.sum())
            high = int(relative_S.argmax())
            low = int(np.where(self.free_S > 0, relative_S, math.inf).argmin())
            if self.free_S[low] <= 0:
                break
            if self.idle_L[row] and not self.newcomer_S[low]:
                break  # without load there is nothing to balance, but a new server should not stay empty
            if relative_S[high] <= self.inputs.imbalance * mean and relative_S[low] >= 0.5 * mean:
                break
            gap = float(relative_S[high] - relative_S[low])
            best_gain, best = 0.1 * mean, -1
            for expert, held in enumerate(self.shares[row]):
                if len(held) != 1 or high not in held:
                    continue
                if (self._key(row, expert), self.ids[low]) in self.inputs.blocked:
                    continue
                weight = float(self.weight_LE[row, expert])
                gain = min(weight / self.speed_S[high], gap - weight / self.speed_S[low])
                if gain > best_gain:
                    best_gain, best = gain, expert
            if best < 0:
                break
            self._set_shares(row, best, {low: 1.0})
            self.free_S[high] += 1
            self.free_S[low] -= 1
            self.moves_left -= 1
            moved = True
        return moved
