"""Spare bytes for survival: second copies (or K+1-th ones, to survive K losses) where a loss would cost the most.

The server whose loss would take the most gate mass with it gets its hottest expert copied elsewhere, and so on: that
makes the worst loss as small as the bytes allow. A spare copy takes the smallest share of traffic that keeps it warm.
When bytes have run out, a spare copy of a clearly colder expert gives way.

Shapes: L layers, E experts, S servers.
"""

from heapq import heapify, heappop, heappush

import numpy as np

from cluster.planner_draft import WARM_SHARE, Columns, Draft
from cluster.planner_surplus import add_copy, remove_copy

_COLDER = 2.0  # a spare copy gives way to one of an expert with this many times its mass
_LOAD_WEIGHT = 0.5  # of a server's load in the layer (1 where even) beside its free copies


def mass_at_risk(draft: Draft, columns: Columns) -> float:
    """An upper bound of the gate mass that is lost with the worst max(1, survive) servers; exact for one.

    An expert with n copies is lost only with n servers: it counts 1/n of its mass at each of them.
    """
    losses = max(1, draft.inputs.survive)
    layer_C, expert_C, server_C, _ = columns
    count_C = draft.count_LE[layer_C, expert_C]
    mass_C = np.where(count_C <= losses, draft.inputs.load_LE[layer_C, expert_C] / np.maximum(count_C, 1), 0.0)
    risk_S = np.bincount(server_C, weights=mass_C, minlength=draft.num_servers)
    return float(np.sort(risk_S)[-losses:].sum() / max(float(draft.inputs.load_LE.sum()), 1e-9))


def survive(draft: Draft) -> None:
    """Give experts up to `keep` copies, in spare bytes and within the moves left."""
    lacking_LE = (draft.count_LE > 0) & (draft.count_LE < draft.keep)
    if draft.inputs.survive and draft.moves_left and lacking_LE.any():
        _Survival(draft).spend()


class _Survival:
    """What every server would take with it, and the copies against that."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        mass_LE = draft.weight_LE * np.where(draft.idle_L, 1e-9, 1.0)[:, None]
        self._mass_LE = mass_LE / mass_LE.sum()
        self._risk_S = [0.0] * draft.num_servers
        self._lacking_S: list[list[tuple[float, int, int]]] = [[] for _ in range(draft.num_servers)]
        columns = draft.columns()[:3]
        lacking_C = draft.count_LE[columns[:2]] < draft.keep
        for row, expert, server in zip(*(column[lacking_C].tolist() for column in columns), strict=True):
            mass, count = float(self._mass_LE[row, expert]), int(draft.count_LE[row, expert])
            self._risk_S[server] += mass / count
            self._lacking_S[server].append((-mass / (draft.keep - count), row, expert))
        self._worst = [(-risk, server) for server, risk in enumerate(self._risk_S)]
        heapify(self._worst)
        for lacking in self._lacking_S:
            heapify(lacking)
        self._spares: list[tuple[float, int, int]] | None = None

    def spend(self) -> None:
        """Protect the hottest expert of the server with most at risk, until bytes or moves have run out."""
        draft, worst = self._draft, self._worst
        while worst and draft.moves_left:
            risk, server = heappop(worst)
            if risk != -self._risk_S[server]:
                continue  # changed since: its newer entry counts
            lacking = self._lacking_S[server]
            while lacking and draft.count_LE[lacking[0][1:]] >= draft.keep:
                heappop(lacking)
            if not lacking:
                continue
            _, row, expert = heappop(lacking)
            if not self._protect(row, expert) and not draft.free_S.any():
                return
            heappush(worst, (-self._risk_S[server], server))

    def _protect(self, row: int, expert: int) -> bool:
        draft = self._draft
        while draft.count_LE[row, expert] < draft.keep and draft.moves_left:
            server = self._spare_server(row, expert)
            if server is None:
                server = self._exchanged(row, expert) if draft.free_S.any() else self._given_way(row, expert)
            if server is None:
                return False
            self._change_risk(row, expert, -1)
            add_copy(draft, row, expert, server, WARM_SHARE)
            self._change_risk(row, expert, 1)
            self._note_load(row, expert, server)
        return True

    def _spare_server(self, row: int, expert: int) -> int | None:
        """The one with the most free bytes, and of those the least loaded."""
        draft = self._draft
        weighted_S = _LOAD_WEIGHT * draft.load_LS[row] / (draft.level_L[row] * draft.speed_S)
        return draft.cheapest(row, expert, weighted_S - draft.free_S)

    def _exchanged(self, row: int, expert: int) -> int | None:
        """Only servers that have the expert have bytes left: another expert moves there and leaves its place."""
        draft = self._draft
        if draft.moves_left < 2 or not draft.inputs.swaps:
            return None
        shares_E, on = draft.shares(row), draft.on(row)
        for free in np.flatnonzero(draft.free_S > 0).tolist():
            for server in range(draft.num_servers):
                if not draft.may_hold(row, expert, server):
                    continue
                for other in sorted(on[server], key=lambda other: (shares_E[other][server], other)):
                    if draft.may_hold(row, other, free):
                        self._change_risk(row, other, -1)
                        shares = {free if s == server else s: share for s, share in shares_E[other].items()}
                        draft.set_shares(row, other, shares)
                        self._change_risk(row, other, 1)
                        self._note_load(row, other, free)
                        return server
        return None

    def _given_way(self, row: int, expert: int) -> int | None:
        """Bytes of a spare copy of a colder expert, if the worst loss becomes smaller by that."""
        draft, mass = self._draft, float(self._mass_LE[row, expert])
        if self._spares is None:
            cells = np.argwhere(draft.count_LE > draft.least).tolist()
            self._spares = sorted((float(self._mass_LE[r, e]), r, e) for r, e in cells)
        highest = max(self._risk_S[server] for server in draft.shares(row)[expert])
        for spare_mass, other_row, other in self._spares:
            if _COLDER * spare_mass >= mass:
                break
            shares = draft.shares(other_row)[other]
            server = min(shares, key=lambda server: (shares[server], server))
            if len(shares) <= draft.least or not draft.may_hold(row, expert, server):
                continue
            rest = len(shares) - 1
            if any(self._risk_S[left] + spare_mass / rest >= highest for left in shares if left != server):
                continue
            mark, peak = draft.mark(), draft.peak(other_row)
            self._change_risk(other_row, other, -1)
            remove_copy(draft, other_row, other, server)
            if draft.peak(other_row) > max(peak, 1 / draft.inputs.goal) + 1e-9:
                draft.undo(mark)
                self._change_risk(other_row, other, 1)
                continue
            self._change_risk(other_row, other, 1)
            draft.unloads[(other_row, other, server)] = "memory"
            return server
        return None

    def _change_risk(self, row: int, expert: int, sign: int) -> None:
        """Take what an expert puts at risk off its servers (-1), or put it there (1)."""
        shares = self._draft.shares(row)[expert]
        if len(shares) < self._draft.keep:
            for server in shares:
                self._risk_S[server] += sign * float(self._mass_LE[row, expert]) / len(shares)
                heappush(self._worst, (-self._risk_S[server], server))

    def _note_load(self, row: int, expert: int, server: int) -> None:
        draft = self._draft
        draft.loads.pop((row, expert, server), None)
        draft.loads[(row, expert, server)] = ("survival", float(draft.weight_LE[row, expert] / draft.total_L[row]))
        draft.moves_left -= 1
