"""Layers out of balance, brought to their goal with few loads.

A layer is as slow as its most loaded server, so that server is relieved, again and again, until no server is above the
level of the goal, or nothing helps. What relieves a server, best first:

1. shares: what it computes for an expert with other copies goes to those with room. Costs nothing;
2. one load: a whole expert moves (costs no bytes in the end), or an expert is copied and the copy carries exactly what
   is too much (costs a byte for good, so it has to be worth more);
3. a load onto a server without free bytes, where a surplus copy gives way, or two experts change places.

A layer that does not reach its goal keeps only the steps that made it clearly faster; copies that it was denied for
lack of bytes are counted.

Shapes: S servers.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cluster.planner_draft import WARM_SHARE, Draft, Floats
from cluster.planner_fill import water_levels
from cluster.planner_surplus import Copy, Evictions

_COPY_WORTH = 0.9  # of a move that relieves as much: a copy costs bytes for good
_DEAR_COPY_WORTH = 0.3  # the same for a layer that has had its part of the free bytes
_SWAPS_TRIED = 8  # of the best, while copies are blocked
_SWAP_WORTH = 0.5  # of a move that relieves as much: it takes two loads
_LEAST_RELIEF = 0.02  # of the even load: less is not worth a load
_DEAR_RELIEF = 0.2  # the same while bytes are too short for the goal
_ABOVE_GOAL = 0.005  # of the balancedness: a layer is done when it is _NEAR the level for that
_NEAR = 0.005  # of the even load: steps that bring a layer no nearer than this to its end are left out
_NEWCOMER = 0.25  # of the mean fill: a server that holds less should take load at once
_TOLERANCE = 1e-9


def rebalance(draft: Draft, *, new: Collection[int]) -> int:
    """Bring layers below `rebalance_below` to the goal, the worst first; returns how many copies bytes were short of.

    A server that has just come is reason enough to touch every layer that is below the goal.

    Args:
        new: layers that were filled just now, and are to reach the goal in any case.
    """
    if not draft.num_servers:
        return 0
    inputs, peak_L = draft.inputs, (draft.load_LS / draft.speed_S).max(axis=1) / draft.level_L
    touched = 1 / (inputs.goal if newcomers(draft) else inputs.rebalance_below)
    limit_L = np.full(draft.num_layers, touched)
    aim = min(inputs.goal + _ABOVE_GOAL, 1.0)
    limit_L[list(new)] = 1 / aim
    rows = np.flatnonzero((peak_L > limit_L + _TOLERANCE) & ~draft.idle_L)
    rows = rows[np.argsort(-peak_L[rows], kind="stable")]
    if not rows.size:
        return 0
    level_L = water_levels(draft, rows.tolist(), _spare(draft), aim=aim)
    evictions, short = Evictions(draft), 0
    for place, row in enumerate(rows.tolist()):
        part = _spare(draft) // (len(rows) - place)
        short += _Layer(draft, row, float(level_L[place]), part, evictions).balance(new=row in new)
    return short


def _spare(draft: Draft) -> int:
    """Copies that balance may add: in free bytes, and in those of experts that nobody asks for."""
    return int(draft.free_S.sum()) + int(draft.count_LE[draft.cold_LE].sum())


def spread_idle(draft: Draft) -> None:
    """Layers without load give a server that has just come its part of their copies."""
    mean = 1 - draft.free_S.sum() / max(int(draft.budget_S.sum()), 1)
    idle = np.flatnonzero(draft.idle_L).tolist()
    for server in newcomers(draft):
        part = int(mean * draft.budget_S[server])
        for row in idle:
            while draft.budget_S[server] - draft.free_S[server] < part and draft.moves_left:
                if not _give_idle(draft, row, server):
                    break


def newcomers(draft: Draft) -> list[int]:
    """Servers that hold next to nothing yet."""
    fill_S = 1 - draft.free_S / np.maximum(draft.budget_S, 1)
    mean = 1 - draft.free_S.sum() / max(int(draft.budget_S.sum()), 1)
    return np.flatnonzero((fill_S < _NEWCOMER * mean) & (draft.budget_S > 0)).tolist()


def _give_idle(draft: Draft, row: int, server: int) -> bool:
    """One expert of an idle layer moves from the server that holds most of it, if that evens the layer out."""
    load_S = draft.load_LS[row]
    giver = int((load_S / draft.speed_S).argmax())
    if (load_S[giver] - 1) / draft.speed_S[giver] < (load_S[server] + 1) / draft.speed_S[server] - _TOLERANCE:
        return False
    for expert in sorted(draft.on(row)[giver]):
        if len(draft.shares(row)[expert]) == 1 and draft.may_hold(row, expert, server):
            draft.set_shares(row, expert, {server: 1.0})
            draft.loads[(row, expert, server)] = ("load", 1 / float(draft.total_L[row]))
            draft.moves_left -= 1
            return True
    return False


@dataclass(frozen=True, slots=True)
class _State:
    """A layer on its way: the journal, the most loaded server's load per speed, loads and evictions so far."""

    mark: int
    top: float
    num_loads: int
    num_evicted: int


@dataclass(frozen=True, slots=True)
class _Relief:
    """A load that takes `share` of an expert off the server to be relieved.

    Args:
        worth: what it relieves, less for what costs more.
        whole: the copy there goes.
        back: the expert that comes in exchange.
    """

    worth: float
    expert: int
    server: int
    share: float
    whole: bool
    back: int | None = None


class _Layer:
    """One layer on its way to `level`, the load per unit of speed that no server should pass."""

    def __init__(self, draft: Draft, row: int, level: float, cheap_copies: int, evictions: Evictions) -> None:
        self._draft, self._row, self._level, self._evictions = draft, row, level, evictions
        self._load_S: Floats = draft.load_LS[row]
        self._weight_E = draft.weights(row)
        self._on = draft.on(row)
        self._even = float(draft.level_L[row])
        short = level > 1.02 * self._even / draft.inputs.goal
        self._least_relief = _DEAR_RELIEF if short else _LEAST_RELIEF
        self._bytes_bind = True
        self._cheap_copies = cheap_copies + int(draft.count_LE[row].sum())
        self._loads: list[Copy] = []
        self._evicted: list[Copy] = []

    def balance(self, *, new: bool) -> int:
        """Change the draft; returns the copies for which bytes were short."""
        draft, inputs = self._draft, self._draft.inputs
        states = [self._state()]
        while len(states) < 8 * (draft.num_servers + draft.num_experts) and self._relieve_top():
            states.append(self._state())
        before, reached = states[0].top, states[-1].top
        short = 0
        if reached * inputs.rebalance_below > self._even and draft.moves_left:
            short = max(self._denied(), self._lacking())
        near = self._level + _NEAR * self._even
        if reached > max(near, self._even / inputs.goal):
            least_gain = 0.0 if new else (inputs.goal - inputs.rebalance_below) / 2
            gained = before - reached >= least_gain * before
            near = reached + (0.0 if new else _NEAR * self._even) if gained else before
        near = max(near, reached) + _TOLERANCE * self._even
        last = next(i for i, state in enumerate(states) if state.top <= near)
        while states[last].num_loads > draft.moves_left:
            last -= 1  # the next plan goes on from there
        self._keep(states[: last + 1])
        return short

    def _state(self) -> _State:
        top = float((self._load_S / self._draft.speed_S).max())
        return _State(self._draft.mark(), top, len(self._loads), len(self._evicted))

    def _keep(self, states: list[_State]) -> None:
        draft, last = self._draft, states[-1]
        draft.undo(last.mark)
        scale = float(draft.speed_S.mean()) / float(draft.total_L[self._row])
        for before, after in pairwise(states):
            for load in self._loads[before.num_loads : after.num_loads]:
                draft.loads.pop(load, None)
                draft.loads[load] = ("load", max(before.top - after.top, 0.0) * scale)
        draft.moves_left -= last.num_loads
        draft.unloads |= dict.fromkeys(self._evicted[: last.num_evicted], "memory")

    def _denied(self) -> int:
        """How many loads more it would take if bytes were no matter. Changes nothing."""
        draft, state = self._draft, self._state()
        self._bytes_bind = False
        for _ in range(draft.num_servers + draft.num_experts):
            if not self._relieve_top():
                break
        self._bytes_bind = True
        short = sum(draft.free_S[server] < 0 for _, _, server in self._loads[state.num_loads :])
        draft.undo(state.mark)
        del self._loads[state.num_loads :], self._evicted[state.num_evicted :]
        return int(short)

    def _lacking(self) -> int:
        """How many copies more it would take so that no copy is more than an average server's load at the goal."""
        draft = self._draft
        most = float(draft.speed_S.mean()) * self._even / draft.inputs.goal
        need_E = np.minimum(np.ceil(draft.weight_LE[self._row] / most - _TOLERANCE), draft.most)
        return int(np.maximum(need_E - draft.count_LE[self._row], 0).sum())

    def _relieve_top(self) -> bool:
        """Take load off the most loaded server: down to the level, or else some way towards it."""
        relative_S = self._load_S / self._draft.speed_S
        server = int(relative_S.argmax())
        top = float(relative_S[server])
        if top <= self._level + _NEAR * self._even:
            return False
        least = self._least_relief * self._even * float(self._draft.speed_S[server])
        for part in (0, 0.5, 0.75):
            level = self._level + (top - self._level) * part
            excess = (top - level) * float(self._draft.speed_S[server])
            enough = least if part else min(excess, least)
            if excess >= enough and self._relieve(server, level, enough - _TOLERANCE * self._even):
                return True
        return False

    def _relieve(self, server: int, level: float, enough: float) -> bool:
        """Take at least `enough` off a server by shares and one more place for an expert; nobody gets above `level`."""
        draft, mark, num_evicted = self._draft, self._draft.mark(), len(self._evicted)
        excess = -float(self._room(level)[server])
        left = self._shift(server, level)
        if left > _NEAR * self._even and draft.moves_left:
            relief = self._best(server, level, min(enough, left))
            if relief is not None:
                self._apply(server, relief)
                if not relief.whole and left > 2 * relief.share * self._weight_E[relief.expert]:
                    self._spread(server, relief.expert, level, enough)
                return True
        if excess - left >= enough or left <= _NEAR * self._even:
            return True
        draft.undo(mark)
        del self._evicted[num_evicted:]
        return False

    def _room(self, level: float) -> Floats:
        """The load that every server may still take."""
        room_S: Floats = level * self._draft.speed_S - self._load_S
        return room_S

    def _shift(self, server: int, level: float) -> float:
        """Other copies of the server's experts take over as far as they have room; returns what stays too much."""
        draft, shares_E, room_S = self._draft, self._draft.shares(self._row), self._room(level)
        excess = -float(room_S[server])
        several = [
            (-shares_E[expert][server] * self._weight_E[expert], expert)
            for expert in self._on[server]
            if len(shares_E[expert]) > 1
        ]
        for _, expert in sorted(several):
            if excess <= _TOLERANCE * self._even:
                break
            weight, shares = self._weight_E[expert], dict(shares_E[expert])
            for other in sorted(shares, key=lambda other: (-room_S[other], other)):
                amount = min(excess, float(room_S[other]), (shares[server] - WARM_SHARE) * weight)
                if other != server and amount > _TOLERANCE * self._even:
                    shares[other] += amount / weight
                    shares[server] -= amount / weight
                    room_S[other] -= amount
                    excess -= amount
            if shares != shares_E[expert]:
                draft.set_shares(self._row, expert, shares)
        return excess

    def _best(self, server: int, level: float, enough: float) -> _Relief | None:
        """The load that helps most. Room for it is made where that helps clearly more."""
        draft, room_S = self._draft, self._room(level)
        excess = -float(room_S[server])
        free_S = draft.free_S > 0 if self._bytes_bind else np.ones(draft.num_servers, dtype=np.bool_)
        found = self._best_into(server, np.where(free_S, room_S, 0.0), excess, enough)
        full_S = np.where(free_S, 0.0, room_S)
        target = int(full_S.argmax())
        possible = min(excess, float(full_S[target]))
        if possible >= enough and possible * _COPY_WORTH > (found.worth if found else 0.0):
            evicted = self._evictions.make_room(target)
            if evicted is not None:
                self._evicted.append(evicted)
                return self._best(server, level, enough)
        if found is None or excess * _SWAP_WORTH > found.worth:
            swap = self._swap(server, room_S, excess, enough)
            if swap is not None and (found is None or swap.worth > found.worth):
                return swap
        return found

    def _swap(self, server: int, room_S: Floats, excess: float, enough: float) -> _Relief | None:
        """Two experts with one copy each change places, so that the difference is what is too much. Takes no bytes."""
        draft, sole_E = self._draft, self._draft.sole(self._row)
        if draft.moves_left < 2 or not draft.inputs.swaps:
            return None
        expert_N = np.flatnonzero(sole_E >= 0)
        server_N = sole_E[expert_N]
        weight_N = draft.weight_LE[self._row, expert_N]
        here, there = server_N == server, server_N != server
        off_NM = weight_N[here][:, None] - weight_N[there]
        worth_NM = np.minimum(off_NM, excess) - (off_NM - excess).clip(0.0) * _TOLERANCE  # the least beyond is best
        worth_NM[(off_NM < enough) | (off_NM > room_S[server_N[there]])] = 0.0
        useful = np.flatnonzero(worth_NM > 0)
        for place in useful[np.argsort(-worth_NM.flat[useful], kind="stable")[:_SWAPS_TRIED]].tolist():
            n, m = divmod(place, worth_NM.shape[1])
            expert, back, other = int(expert_N[here][n]), int(expert_N[there][m]), int(server_N[there][m])
            if draft.may_hold(self._row, expert, other) and draft.may_hold(self._row, back, server):
                return _Relief(_SWAP_WORTH * float(worth_NM[n, m]), expert, other, 1.0, True, back)
        return None

    def _best_into(self, server: int, room_S: Floats, excess: float, enough: float) -> _Relief | None:
        """The load that helps most, onto servers with room (0: none). A move that is enough beats the best copy."""
        shares_E, row, draft = self._draft.shares(self._row), self._row, self._draft
        most = float(room_S.max())
        if min(most, excess) < enough:
            return None
        amounts = sorted((-shares_E[expert][server] * self._weight_E[expert], expert) for expert in self._on[server])
        fitting = [(-negative, expert) for negative, expert in amounts if enough <= -negative <= most]
        finishing = [entry for entry in reversed(fitting) if entry[0] >= excess]
        found: _Relief | None = None
        for amount, expert in (*finishing, *fitting[len(finishing) :]):
            target = self._target(expert, amount, room_S)
            if target is not None:
                found = _Relief(min(amount, excess), expert, target, shares_E[expert][server], True)
                break
        dear = self._bytes_bind and int(draft.count_LE[row].sum()) >= self._cheap_copies
        copy_worth = _DEAR_COPY_WORTH if dear else _COPY_WORTH
        for negative, expert in amounts:
            weight = self._weight_E[expert]
            warm = WARM_SHARE * weight
            amount = max(min(excess, most, -negative - warm), warm)
            if (
                -negative < 2 * warm
                or amount > most
                or amount < enough
                or copy_worth * amount <= (found.worth if found else 0.0)
            ):
                break
            if draft.count_LE[row, expert] < draft.most:
                target = self._target(expert, amount, room_S)
                if target is not None:
                    return _Relief(copy_worth * amount, expert, target, amount / weight, False)
        return found

    def _target(self, expert: int, amount: float, room_S: Floats) -> int | None:
        """The server for `amount` of an expert: of those with room the one with most free bytes, then the fullest."""
        fits = np.flatnonzero((room_S >= amount - _TOLERANCE * self._even) & (room_S > 0))
        rank = self._draft.free_S[fits] - room_S[fits] / (2 * self._draft.total_L[self._row])
        for place in np.argsort(-rank, kind="stable").tolist():
            if self._draft.may_hold(self._row, expert, int(fits[place])):
                return int(fits[place])
        return None

    def _apply(self, server: int, relief: _Relief) -> None:
        draft = self._draft
        if relief.back is not None:
            draft.set_shares(self._row, relief.back, {server: 1.0})
            self._loads.append((self._row, relief.back, server))
        shares = dict(draft.shares(self._row)[relief.expert])
        shares[server] -= relief.share
        shares[relief.server] = relief.share
        if relief.whole:
            del shares[server]
        draft.set_shares(self._row, relief.expert, shares)
        self._loads.append((self._row, relief.expert, relief.server))

    def _spread(self, server: int, expert: int, level: float, enough: float) -> None:
        """An expert far above what one server can take goes to several at once, those with the most room first."""
        draft, room_S, weight = self._draft, self._room(level), self._weight_E[expert]
        shares = dict(draft.shares(self._row)[expert])
        excess = min(-float(room_S[server]), (shares[server] - WARM_SHARE) * weight)
        spare = self._cheap_copies - int(draft.count_LE[self._row].sum()) if self._bytes_bind else draft.num_servers
        spare = min(spare, draft.most - len(shares), draft.moves_left - 1)
        usable_S = np.where((draft.free_S > 0) | (not self._bytes_bind), room_S, 0.0)
        for other in np.argsort(-usable_S, kind="stable").tolist():
            amount = min(excess, float(usable_S[other]))
            if spare <= 0 or amount < enough:
                break
            if draft.may_hold(self._row, expert, other):
                shares[other] = amount / weight
                shares[server] -= amount / weight
                excess -= amount
                spare -= 1
                self._loads.append((self._row, expert, other))
        draft.set_shares(self._row, expert, shares)
