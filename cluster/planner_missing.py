"""A place for every expert that has too few copies. Never limited by moves.

Layers without any copy are filled whole (`planner_fill`); single experts go hottest first to the server where they hurt
least. Short of memory, surplus copies give way, cheapest first, then experts that are clearly colder than one without a
place; clearly, so that two of about the same load do not take turns.

Shapes: L layers, E experts, S servers.
"""

import numpy as np
import numpy.typing as npt

from cluster.planner_draft import Draft
from cluster.planner_fill import fill_layers
from cluster.planner_surplus import add_copy, remove_copy, surplus_copies

_COLDER = 2.0  # an expert gives way to one with this many times its load
_BYTES_WEIGHT = 0.05  # of a server's free bytes (0 to 1) beside its load (1 where even)

Cell = tuple[int, int]  # (row, expert)


def place_missing(draft: Draft) -> list[Cell]:
    """Give every expert its copies; returns those that are left without any, most loaded first."""
    load_LE = draft.inputs.load_LE
    _fit_budgets(draft)
    wanted_LE = (draft.count_LE == 0) & ~draft.cold_LE
    lost: list[Cell] = []
    if wanted_LE.any():
        lost = _make_room(draft, wanted_LE)
        for cell in lost:
            wanted_LE[cell] = False
        blocked_rows = {row for row, _, _ in draft.blocked}
        fresh_L = (draft.count_LE.sum(axis=1) == 0) & wanted_LE.any(axis=1)
        fresh = [row for row in np.flatnonzero(fresh_L).tolist() if row not in blocked_rows]
        if fresh:
            fill_layers(draft, fresh, wanted_LE)
            wanted_LE[fresh] = False
        lost += [cell for cell in _hottest_first(draft, wanted_LE) if not _add(draft, *cell)]
        lost.sort(key=lambda cell: (-load_LE[cell], cell))
    for have in range(1, draft.least):
        for cell in _hottest_first(draft, draft.count_LE == have):
            _add(draft, *cell)
    return lost


def best_server(draft: Draft, row: int, expert: int) -> int | None:
    """The server with room where one more copy hurts least: by its layer's load, then by bytes."""
    if not draft.num_servers:
        return None
    load_S = (draft.load_LS[row] + draft.weight_LE[row, expert]) / (draft.level_L[row] * draft.speed_S)
    return draft.cheapest(row, expert, load_S - _BYTES_WEIGHT * draft.free_S / np.maximum(draft.budget_S, 1))


def _add(draft: Draft, row: int, expert: int) -> bool:
    """One more copy, in free bytes or those of a surplus copy."""
    have = int(draft.count_LE[row, expert])
    server = best_server(draft, row, expert)
    if server is None:
        usable = (copy for copy in surplus_copies(draft, draft.least if have else 1))
        copy = next(
            (copy for copy in usable if copy[:2] != (row, expert) and draft.may_hold(row, expert, copy[2])), None
        )
        if copy is None:
            return False
        remove_copy(draft, *copy)
        draft.unloads[copy] = "memory"
        server = copy[2]
    add_copy(draft, row, expert, server, 1 / (have + 1))
    return True


def _fit_budgets(draft: Draft) -> None:
    """Servers that hold more than their budget give up surplus copies, then their coldest experts."""
    if (draft.free_S >= 0).all():
        return
    for beyond in (draft.keep, draft.least, 1):
        for copy in surplus_copies(draft, beyond):
            if draft.free_S[copy[2]] < 0:
                remove_copy(draft, *copy)
                draft.unloads[copy] = "memory"
    for row, expert in reversed(_hottest_first(draft, draft.count_LE == 1)):
        (server,) = draft.shares(row)[expert]
        if draft.free_S[server] < 0:
            draft.set_shares(row, expert, {})
            draft.unloads[(row, expert, server)] = "memory"


def _make_room(draft: Draft, wanted_LE: npt.NDArray[np.bool_]) -> list[Cell]:
    """Free bytes for first copies as far as that is worth it; returns the experts to do without."""
    load_LE = draft.inputs.load_LE
    short = int(wanted_LE.sum()) - int(np.maximum(draft.free_S, 0).sum())
    if short <= 0:
        return []
    for copy in surplus_copies(draft, 1):
        remove_copy(draft, *copy)
        draft.unloads[copy] = "memory"
        short -= 1
        if not short:
            return []
    # The coldest of the wanted do without, unless experts that have a copy are clearly colder.
    lost = _hottest_first(draft, wanted_LE)[-short:]
    given_up = []
    held = np.argwhere(draft.count_LE == 1)
    held = held[np.argsort(load_LE[held[:, 0], held[:, 1]], kind="stable")]
    for cell, colder in zip(lost, [(row, expert) for row, expert in held.tolist()], strict=False):
        if load_LE[cell] <= _COLDER * load_LE[colder]:
            break
        (server,) = draft.shares(colder[0])[colder[1]]
        draft.set_shares(*colder, {})
        draft.unloads[(*colder, server)] = "memory"
        given_up.append(colder)
    return lost[len(given_up) :] + [cell for cell in given_up if not draft.cold_LE[cell]]


def _hottest_first(draft: Draft, chosen_LE: npt.NDArray[np.bool_]) -> list[Cell]:
    """The chosen experts of all layers, most loaded first."""
    cells = np.argwhere(chosen_LE)
    order = np.argsort(-draft.inputs.load_LE[chosen_LE], kind="stable")
    return [(row, expert) for row, expert in cells[order].tolist()]
