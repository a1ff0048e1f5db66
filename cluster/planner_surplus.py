"""Copies beyond what an expert needs: which go because they no longer pay, and which give way when bytes are needed.

Shapes: L layers, E experts, S servers.
"""

from collections.abc import Iterator

import numpy as np

from cluster.planner_draft import Draft

Copy = tuple[int, int, int]  # (row, expert, server)


def drop_surplus(draft: Draft) -> None:
    """Copies go that their layer can do without: the others have room, clearly below the goal, for what they carry.

    Clearly: halfway between the goal and perfect balance, so that noise does not bring a copy back. Idle layers keep
    theirs: silence says nothing about heat.
    """
    slack = 2 / (1 + draft.inputs.goal)
    for row, expert in _doubtful(draft, slack):
        weight = draft.weights(row)[expert]
        shares = draft.shares(row)[expert]
        while len(shares) > draft.keep:
            least = min(shares, key=lambda server: (shares[server], server))
            full = slack * draft.level_L[row]
            room = {
                server: max(0.0, float(full * draft.speed_S[server] - draft.load_LS[row, server])) / weight
                for server in shares
                if server != least
            }
            total = sum(room.values())
            if total < shares[least]:
                break
            part = shares[least] / total if total else 0.0
            shares = {server: shares[server] + part * more for server, more in room.items()}
            draft.set_shares(row, expert, shares)
            draft.unloads[(row, expert, least)] = "surplus"


def _doubtful(draft: Draft, slack: float) -> list[tuple[int, int]]:
    """Experts whose least copy might fit into the room at all their copies; a quick look over all layers."""
    several_LE = (draft.count_LE > draft.keep) & ~draft.idle_L[:, None]
    if not several_LE.any():
        return []
    layer_C, expert_C, server_C, share_C = draft.columns()
    chosen_C = np.flatnonzero(several_LE[layer_C, expert_C])
    layer_C, expert_C, server_C = (column[chosen_C] for column in (layer_C, expert_C, server_C))
    share_C = share_C[chosen_C]
    room_C = slack * draft.level_L[layer_C] * draft.speed_S[server_C] - draft.load_LS[layer_C, server_C]
    cell_C = layer_C * draft.num_experts + expert_C
    room_X = np.bincount(cell_C, weights=room_C.clip(0.0), minlength=draft.count_LE.size)
    least_X = np.full(draft.count_LE.size, np.inf)
    np.minimum.at(least_X, cell_C, share_C * draft.weight_LE[layer_C, expert_C])
    return [divmod(cell, draft.num_experts) for cell in np.flatnonzero(least_X <= room_X).tolist()]


def surplus_copies(draft: Draft, beyond: int) -> Iterator[Copy]:
    """The copies that experts have beyond so many, those that carry least first, as long as they are there."""
    found = []
    for row, expert in np.argwhere(draft.count_LE > beyond).tolist():
        weight = draft.weights(row)[expert] / float(draft.total_L[row])
        found += [(share * weight, row, expert, server) for server, share in draft.shares(row)[expert].items()]
    for _, row, expert, server in sorted(found):
        shares = draft.shares(row)[expert]
        if len(shares) > beyond and server in shares:
            yield row, expert, server


def add_copy(draft: Draft, row: int, expert: int, server: int, share: float) -> None:
    """A new copy takes `share` of its expert; the others give in proportion to theirs."""
    old = draft.shares(row)[expert]
    draft.set_shares(row, expert, {other: part * (1 - share) for other, part in old.items()} | {server: share})


def remove_copy(draft: Draft, row: int, expert: int, server: int) -> None:
    """A copy goes; the others take over in proportion to their shares."""
    rest = {other: share for other, share in draft.shares(row)[expert].items() if other != server}
    total = sum(rest.values())
    draft.set_shares(row, expert, {other: share / total for other, share in rest.items()})


class Evictions:
    """Surplus copies server by server, for a plan that needs bytes in one place; those of cold experts come first.

    The list is made once, when it is first needed; what has changed since is checked when it is used, and a copy that
    its layer needed once is not asked for again.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._copies_S: list[list[Copy]] | None = None  # the cheapest last

    def make_room(self, server: int) -> Copy | None:
        """Let the cheapest copy there go that its layer can do without; None if there is none."""
        if self._copies_S is None:
            self._copies_S = self._by_server()
        copies = self._copies_S[server]
        while copies:
            row, expert, _ = copies[-1]
            if self._can_go(copies[-1]):
                if self._draft.count_LE[row, expert] == 1:
                    self._draft.set_shares(row, expert, {})
                else:
                    remove_copy(self._draft, *copies[-1])
                return copies[-1]  # it stays listed: what is taken back may go again
            copies.pop()
        return None

    def _by_server(self) -> list[list[Copy]]:
        draft = self._draft
        columns = draft.columns()
        cold_C = draft.cold_LE[columns[:2]]
        chosen_C = (draft.count_LE[columns[:2]] > draft.least) | cold_C
        layer_C, expert_C, server_C, share_C = (column[chosen_C] for column in columns)
        carried_C = share_C * draft.weight_LE[layer_C, expert_C] / draft.total_L[layer_C]
        carried_C[cold_C[chosen_C]] = -1.0
        order_C = np.lexsort((expert_C, layer_C, carried_C, server_C))[::-1]
        found: list[list[Copy]] = [[] for _ in range(draft.num_servers)]
        for copy in zip(*(column[order_C].tolist() for column in (layer_C, expert_C, server_C)), strict=True):
            found[copy[2]].append(copy)
        return found

    def _can_go(self, copy: Copy) -> bool:
        draft, (row, expert, server) = self._draft, copy
        shares = draft.shares(row)[expert]
        if server not in shares or (len(shares) <= draft.least and not draft.cold_LE[row, expert]):
            return False
        carried, rest = shares[server] * draft.weights(row)[expert], 1 - shares[server]
        level = max(draft.peak(row), 1 / draft.inputs.goal) * draft.level_L[row]
        for other, share in shares.items():
            if other != server:
                load = draft.load_LS[row, other] + carried * share / rest
                if load > level * draft.speed_S[other] * (1 + 1e-9):
                    return False
        return True
