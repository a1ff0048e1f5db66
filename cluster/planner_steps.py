"""From the current copies to a finished draft: the target, the steps that lead there, and what there is to report.

Shapes: L layers, E experts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from cluster.messages import Key
from cluster.planner_draft import WARM_SHARE, Columns, Draft, Shares
from cluster.planner_survival import mass_at_risk
from cluster.planner_types import Plan
from cluster.steps import Load, Reason, Reshare, Unload
from router.table import CopyShare

_URGENCY: dict[Reason, int] = {"missing": 0, "drain": 1, "load": 2, "survival": 3}
_SAME_SHARE = 1e-9
_WARM_AT_MOST = 1.5 * WARM_SHARE


def finish(draft: Draft, lost: Iterable[tuple[int, int]], short: int) -> Plan:
    """The plan of a draft.

    Args:
        lost: experts (row, expert) without a place.
        short: copies that balance was denied.
    """
    steps, columns = _Steps(draft), draft.columns()
    for row, experts in steps.changed():
        steps.compare(row, experts)
    return Plan(
        copies=steps.copies,
        steps=(*steps.loads(), *steps.unloads, *steps.reshares),
        missing=tuple(draft.key(*cell) for cell in lost),
        wanted_copies=short,
        needed_copies=_needed_copies(draft, columns),
        single_copies=int((draft.count_LE == 1).sum()),
        mass_at_risk=mass_at_risk(draft, columns),
    )


def _needed_copies(draft: Draft, columns: Columns) -> int:
    """One copy of every placed expert that is asked for or must have one, and what busy layers need for balance: copies
    that carry more than what keeps them warm."""
    layer_C, expert_C, _, share_C = columns
    used_C = (share_C > _WARM_AT_MOST) & ~draft.idle_L[layer_C]
    used_LE = np.zeros_like(draft.count_LE)
    np.add.at(used_LE, (layer_C[used_C], expert_C[used_C]), 1)
    return int(np.maximum(used_LE, draft.count_LE > 0)[~draft.cold_LE].sum())


class _Steps:
    """What differs between the current copies and the draft."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._draining = {server.server_id for server in draft.inputs.servers if server.draining}
        self._whole = [(CopyShare(server_id=server_id, share=1.0),) for server_id in draft.ids]  # many use the same
        self._total_L: list[float] = draft.total_L.tolist()
        self._load_LE: list[list[float]] = np.asarray(draft.inputs.load_LE, dtype=np.float64).tolist()
        self._urgent: list[Load] = []
        self._urgent_load: list[float] = []
        self._further: dict[tuple[int, int, int], Load] = {}
        self.copies: dict[Key, tuple[CopyShare, ...]] = {}
        self.unloads: list[Unload] = []
        self.reshares: list[Reshare] = []

    def changed(self) -> Iterator[tuple[int, Iterable[int]]]:
        """The experts of every layer that may have changed; the copies of all others are taken over."""
        draft, current = self._draft, self._draft.inputs.current
        experts: dict[int, set[int]] = defaultdict(set)
        for row, expert in draft.changed:
            experts[row].add(expert)
        for row, expert in np.argwhere(draft.rescaled_LE & (draft.count_LE > 0)).tolist():
            experts[row].add(expert)
        if draft.whole:
            self.copies = dict(current)
        else:  # some copies are on servers that leave, or are no longer ours
            rows = {layer: row for row, layer in enumerate(draft.inputs.layers)}
            for key, held in current.items():
                row, expert = rows.get(key[0], -1), key[1]
                if row >= 0 and expert < draft.num_experts:
                    if all(copy.server_id in draft.index for copy in held):
                        self.copies[key] = held
                    else:
                        experts[row].add(expert)
        for row in sorted(experts.keys() | draft.filled):
            yield row, range(draft.num_experts) if row in draft.filled else sorted(experts[row])

    def compare(self, row: int, experts: Iterable[int]) -> None:
        """Take experts' copies into the target, with the steps that it takes."""
        draft, current = self._draft, self._draft.inputs.current
        layer, shares_E, whole, ids = draft.inputs.layers[row], draft.shares(row), self._whole, draft.ids
        load_E, total, weight_E = self._load_LE[row], self._total_L[row], draft.weights(row)
        for expert in experts:
            key, shares = (layer, expert), shares_E[expert]
            before = current.get(key, ())
            if before:
                self._change(row, key, shares, before)
            elif len(shares) == 1:  # most experts of a new layer: this loop is its plan's longest
                (server,) = shares
                self.copies[key] = whole[server]
                gain = weight_E[expert] / total
                self._urgent.append(Load(key, ids[server], "missing", gain))
                self._urgent_load.append(load_E[expert])
            elif shares:
                self.copies[key] = self._held(shares)
                for server in shares:
                    self._load(row, key, server, "missing")

    def loads(self) -> list[Load]:
        """Most urgent first. Those for balance and survival keep the order in which they were found."""
        rank = np.array([_URGENCY[load.reason] for load in self._urgent])
        order = np.lexsort((-np.array(self._urgent_load), rank)).tolist()
        further = [self._further[copy] for copy in self._draft.loads if copy in self._further]
        further.sort(key=lambda load: _URGENCY[load.reason])
        return [self._urgent[place] for place in order] + further

    def _held(self, shares: Shares) -> tuple[CopyShare, ...]:
        ids = self._draft.ids
        if len(shares) == 1:
            return self._whole[next(iter(shares))]
        return tuple(CopyShare(server_id=ids[server], share=share) for server, share in sorted(shares.items()))

    def _change(self, row: int, key: Key, shares: Shares, before: tuple[CopyShare, ...]) -> None:
        """An expert that had copies: on our servers, on leaving ones, or on those that are gone."""
        draft = self._draft
        old = {copy.server_id: copy.share for copy in before}
        new = {draft.ids[server]: share for server, share in shares.items()}
        if old.keys() == new.keys():
            if all(abs(share - old[server_id]) <= _SAME_SHARE for server_id, share in new.items()):
                self.copies[key] = before
                return
            self.reshares.append(Reshare(key=key))
        if new:
            self.copies[key] = self._held(shares)
        else:
            self.copies.pop(key, None)
        for server in sorted(shares):
            if draft.ids[server] not in old:
                self._load(row, key, server, "drain" if old.keys() <= self._draining else "missing")
        for server_id in sorted(old.keys() - new.keys()):
            if server_id in draft.index:
                reason = draft.unloads.get((row, key[1], draft.index[server_id]), "load")
                self.unloads.append(Unload(key=key, server_id=server_id, reason=reason))
            elif server_id in self._draining and (new or draft.cold_LE[row, key[1]]):
                # The last copies stay until there are others, unless nobody asks for them.
                self.unloads.append(Unload(key=key, server_id=server_id, reason="drain"))

    def _load(self, row: int, key: Key, server: int, otherwise: Reason) -> None:
        """A load for the reason it was made for; one that no rule made is for an expert without enough copies."""
        draft, expert = self._draft, key[1]
        server_id = draft.ids[server]
        known = draft.loads.get((row, expert, server))
        if known:
            self._further[(row, expert, server)] = Load(key, server_id, *known)
        else:
            gain = draft.weights(row)[expert] / self._total_L[row]
            self._urgent.append(Load(key, server_id, otherwise, gain))
            self._urgent_load.append(self._load_LE[row][expert])
