"""From the current copies to a finished draft: the target, the steps that lead there, and what there is to report.

Shapes: L layers, E experts.
"""

from collections.abc import Iterable

import numpy as np

from cluster.messages import Key
from cluster.planner_draft import Draft
from cluster.planner_survival import mass_at_risk
from cluster.planner_types import Plan
from cluster.steps import Load, Reason, Reshare, Unload
from router.table import CopyShare

_URGENCY: dict[Reason, int] = {"missing": 0, "drain": 1, "load": 2, "survival": 3}
_SAME_SHARE = 1e-9


def finish(draft: Draft, lost: Iterable[tuple[int, int]], short: int) -> Plan:
    """The plan of a draft.

    Args:
        lost: experts (row, expert) without a place.
        short: copies that balance was denied.
    """
    steps = _Steps(draft)
    for row, expert in steps.cells():
        steps.compare(row, expert)
    return Plan(
        copies=steps.copies,
        steps=(*steps.loads(), *steps.unloads, *steps.reshares),
        missing=tuple(draft.key(*cell) for cell in lost),
        wanted_copies=short,
        single_copies=int((draft.count_LE == 1).sum()),
        mass_at_risk=mass_at_risk(draft),
    )


class _Steps:
    """What differs between the current copies and the draft."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._draining = {server.server_id for server in draft.inputs.servers if server.draining}
        self._whole = [(CopyShare(server_id=server_id, share=1.0),) for server_id in draft.ids]  # many use the same
        self._urgent: list[tuple[int, float, Load]] = []  # rank, minus load; sorted at the end
        self._further: dict[tuple[int, int, int], Load] = {}
        self.copies: dict[Key, tuple[CopyShare, ...]] = {}
        self.unloads: list[Unload] = []
        self.reshares: list[Reshare] = []

    def cells(self) -> list[tuple[int, int]]:
        """The experts that may have changed; the copies of all others are taken over."""
        draft, current = self._draft, self._draft.inputs.current
        changed = {cell for cell in draft.changed if cell[0] not in draft.filled}
        changed |= {(row, expert) for row in draft.filled for expert in range(draft.num_experts)}
        changed |= {(row, expert) for row, expert in np.argwhere(draft.rescaled_LE & (draft.count_LE > 0)).tolist()}
        if draft.whole:
            self.copies = dict(current)
        else:  # some copies are on servers that leave, or are no longer ours
            rows = {layer: row for row, layer in enumerate(draft.inputs.layers)}
            active = set(draft.ids)
            for key, held in current.items():
                if not all(copy.server_id in active for copy in held) and key[0] in rows:
                    changed.add((rows[key[0]], key[1]))
                elif key[0] in rows and key[1] < draft.num_experts:
                    self.copies[key] = held
        return sorted(cell for cell in changed if cell[1] < draft.num_experts)

    def compare(self, row: int, expert: int) -> None:
        """Take one expert's copies into the target, with the steps that it takes."""
        draft = self._draft
        key, shares = draft.key(row, expert), draft.shares(row)[expert]
        before = draft.inputs.current.get(key, ())
        old = {copy.server_id: copy.share for copy in before}
        new = {draft.ids[server]: share for server, share in sorted(shares.items())}
        if old.keys() == new.keys():
            if all(abs(share - old[server_id]) <= _SAME_SHARE for server_id, share in new.items()):
                if before:
                    self.copies[key] = before
                return
            self.reshares.append(Reshare(key=key))
        if not new:
            self.copies.pop(key, None)
        elif len(new) == 1:
            self.copies[key] = self._whole[next(iter(shares))]
        else:
            self.copies[key] = tuple(CopyShare(server_id=server_id, share=share) for server_id, share in new.items())
        for server in shares:
            if draft.ids[server] not in old:
                self._load(row, expert, server, key, old)
        for server_id in old:
            if server_id not in new:
                self._unload(row, expert, server_id, key, new)

    def loads(self) -> list[Load]:
        """Most urgent first. Those for balance and survival keep their order: there every load finds room."""
        self._urgent.sort(key=lambda entry: entry[:2])
        ordered = [self._further[copy] for copy in self._draft.loads if copy in self._further]
        ordered.sort(key=lambda load: _URGENCY[load.reason])
        return [load for _, _, load in self._urgent] + ordered

    def _load(self, row: int, expert: int, server: int, key: Key, old: dict[str, float]) -> None:
        draft = self._draft
        server_id = draft.ids[server]
        known = draft.loads.get((row, expert, server))
        if known:
            self._further[(row, expert, server)] = Load(key=key, server_id=server_id, reason=known[0], gain=known[1])
            return
        leaving = bool(old) and old.keys() <= self._draining
        reason: Reason = "drain" if leaving else "missing"
        gain = draft.weights(row)[expert] / float(draft.total_L[row])
        load = float(draft.inputs.load_LE[row, expert])
        self._urgent.append((_URGENCY[reason], -load, Load(key=key, server_id=server_id, reason=reason, gain=gain)))

    def _unload(self, row: int, expert: int, server_id: str, key: Key, new: dict[str, float]) -> None:
        draft = self._draft
        if server_id in self._draining:
            if new:  # the last copies stay where they are until there are others
                self.unloads.append(Unload(key=key, server_id=server_id, reason="drain"))
        elif server_id in draft.index:
            reason = draft.unloads.get((row, expert, draft.index[server_id]), "load")
            self.unloads.append(Unload(key=key, server_id=server_id, reason=reason))
