"""A plan in the making: who holds what with which share, and the loads and free bytes that follow.

The current copies are read once into columns; a layer becomes dictionaries (`shares`) only when a copy in it changes,
so that a plan in which little happens costs little. Every change goes through `set_shares` or `fill_layer`; changes of
`set_shares` can be taken back (`mark`, `undo`).

Shapes: L layers, E experts, S servers that may hold copies, C current copies.
"""

import numpy as np
import numpy.typing as npt

from cluster.messages import Key
from cluster.planner_types import Copies, PlannerInput
from cluster.steps import Reason, UnloadReason

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Shares = dict[int, float]  # server index -> share
Columns = tuple[Ints, Ints, Ints, Floats]  # layer_C, expert_C, server_C, share_C

DEMAND_PAIRS_PER_S = 0.01  # less is the tail of an average that falls for ever
WARM_SHARE = 0.01  # of an expert's traffic that every copy gets, so that it stays warm and its speed known
_BASE_WEIGHT = 0.001  # of the mean expert, added to every expert, so that those without load spread as well


class Draft:
    """See the module docstring.

    Attributes:
        ids, speed_S, budget_S: the servers that may hold copies (draining ones may not), in the order given.
        free_S: copies that still fit.
        weight_LE: what is balanced: the load, plus a little. In idle layers every expert counts the same.
        cold_LE: experts that may do without a copy.
        idle_L: layers with too little load to tell hot from cold.
        level_L: the load per unit of speed if it were even.
        load_LS: what the servers carry. count_LE: copies of each expert.
        keep: copies of an expert that are never surplus, `survive` included; `least`: without it.
        most: copies of one expert at most.
        moves_left: loads that this plan may still spend on balance and survival.
        loads: why copies are loaded and what they gain, in the order they were found; the others are missing.
        unloads: why copies go that do not move.
    """

    def __init__(self, inputs: PlannerInput) -> None:
        self.inputs = inputs
        active = [server for server in inputs.servers if not server.draining]
        self.ids = [server.server_id for server in active]
        self.speed_S = np.array([server.speed for server in active], dtype=np.float64)
        self.budget_S = np.array([server.max_copies for server in active], dtype=np.int64)
        self.num_servers = len(active)
        self.most = min(inputs.max_copies or self.num_servers, self.num_servers)
        self.least = min(max(inputs.min_copies, 1), self.most)
        self.keep = min(max(self.least, inputs.survive + 1), self.most)
        self.moves_left = inputs.max_moves
        self.loads: dict[tuple[int, int, int], tuple[Reason, float]] = {}
        self.unloads: dict[tuple[int, int, int], UnloadReason] = {}
        self.index = {server_id: s for s, server_id in enumerate(self.ids)}

        load_LE = np.asarray(inputs.load_LE, dtype=np.float64)
        self.num_layers, self.num_experts = load_LE.shape
        self.idle_L = (load_LE.sum(axis=1) < inputs.min_pairs_per_s) | ~load_LE.any(axis=1)
        base_L = np.where(self.idle_L, 1.0, _BASE_WEIGHT * load_LE.mean(axis=1))
        # Experts that may be without a copy: nobody asks for them.
        self.cold_LE = (load_LE <= DEMAND_PAIRS_PER_S) & (inputs.min_copies == 0)
        self.weight_LE = np.where(self.idle_L[:, None], 0.0, load_LE) + base_L[:, None]
        self.total_L = self.weight_LE.sum(axis=1)
        self.level_L = self.total_L / max(self.speed_S.sum(), 1e-9)
        self._read(inputs.current)
        self.blocked = self._blocked()

        self._shares: dict[int, list[Shares]] = {}
        self._on: dict[int, list[set[int]]] = {}
        self._sole: dict[int, Ints] = {}
        self._weight: dict[int, list[float]] = {}
        self._journal: list[tuple[int, int, Shares]] = []
        self.changed: set[tuple[int, int]] = set()
        self.filled: set[int] = set()

    # ------------------------------------------------------------------ reading

    def shares(self, row: int) -> list[Shares]:
        """The copies of every expert of a layer. Not to be changed in place."""
        found = self._shares.get(row)
        if found is None:
            found = self._shares[row] = [{} for _ in range(self.num_experts)]
            start, end = np.searchsorted(self._layer_C, (row, row + 1)).tolist()
            rows = (column[start:end].tolist() for column in (self._expert_C, self._server_C, self._share_C))
            for expert, server, share in zip(*rows, strict=True):
                found[expert][server] = share
        return found

    def on(self, row: int) -> list[set[int]]:
        """The experts of a layer on every server."""
        found = self._on.get(row)
        if found is None:
            found = self._on[row] = [set() for _ in range(self.num_servers)]
            for expert, shares in enumerate(self.shares(row)):
                for server in shares:
                    found[server].add(expert)
        return found

    def sole(self, row: int) -> Ints:
        """The server of every expert of a layer that has one copy [E]; -1: it has none or several."""
        found = self._sole.get(row)
        if found is None:
            servers = [next(iter(shares)) if len(shares) == 1 else -1 for shares in self.shares(row)]
            found = self._sole[row] = np.array(servers, dtype=np.int64)
        return found

    def weights(self, row: int) -> list[float]:
        """weight_LE of one layer as a list: small loops are faster on these."""
        found = self._weight.get(row)
        if found is None:
            found = self._weight[row] = self.weight_LE[row].tolist()
        return found

    def peak(self, row: int) -> float:
        """The most loaded server of a layer in units of the even load: 1 over the balancedness."""
        return float((self.load_LS[row] / self.speed_S).max() / self.level_L[row])

    def key(self, row: int, expert: int) -> Key:
        return self.inputs.layers[row], expert

    def may_hold(self, row: int, expert: int, server: int) -> bool:
        """Whether a copy there would be new and is not blocked (bytes aside)."""
        return server not in self.shares(row)[expert] and (row, expert, server) not in self.blocked

    def cheapest(self, row: int, expert: int, cost_S: Floats) -> int | None:
        """The server of least cost that has room for a copy and may hold it; None: there is none. Changes `cost_S`."""
        cost_S[self.free_S <= 0] = np.inf
        cost_S[list(self.shares(row)[expert])] = np.inf
        if self.blocked:
            cost_S[[server for server in range(self.num_servers) if (row, expert, server) in self.blocked]] = np.inf
        server = int(cost_S.argmin())
        return server if np.isfinite(cost_S[server]) else None

    def columns(self) -> Columns:
        """(layer_C, expert_C, server_C, share_C) of all copies as they are now."""
        kept_C = ~np.isin(self._layer_C, list(self._shares))
        old = (self._layer_C, self._expert_C, self._server_C, self._share_C)
        parts = [[column[kept_C] for column in old]]
        for row, shares_E in self._shares.items():
            expert_C = np.repeat(np.arange(self.num_experts), self.count_LE[row])
            server_C = np.array([server for shares in shares_E for server in shares], dtype=np.int64)
            share_C = np.array([share for shares in shares_E for share in shares.values()], dtype=np.float64)
            parts.append([np.full(len(expert_C), row), expert_C, server_C, share_C])
        layer_C, expert_C, server_C, share_C = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return layer_C, expert_C, server_C, share_C

    # ------------------------------------------------------------------ changing

    def set_shares(self, row: int, expert: int, shares: Shares) -> None:
        """Give one expert other copies or other shares. The shares must sum to 1 (or be none)."""
        shares_E, load_S, weight = self.shares(row), self.load_LS[row], self.weights(row)[expert]
        old, on = shares_E[expert], self._on.get(row)
        for server, share in old.items():
            load_S[server] -= share * weight
            if server not in shares:
                self.free_S[server] += 1
                if on is not None:
                    on[server].discard(expert)
        for server, share in shares.items():
            load_S[server] += share * weight
            if server not in old:
                self.free_S[server] -= 1
                if on is not None:
                    on[server].add(expert)
        self.count_LE[row, expert] = len(shares)
        if (sole_E := self._sole.get(row)) is not None:
            sole_E[expert] = next(iter(shares)) if len(shares) == 1 else -1
        shares_E[expert] = shares
        self.changed.add((row, expert))
        self._journal.append((row, expert, old))

    def fill_layer(self, row: int, shares_E: list[Shares]) -> None:
        """Give a layer that has no copies all of its own."""
        self._shares[row] = shares_E
        self._on.pop(row, None)
        self._sole.pop(row, None)
        servers = [server for shares in shares_E for server in shares]
        self.free_S -= np.bincount(np.array(servers, dtype=np.int64), minlength=self.num_servers)
        self.count_LE[row] = [len(shares) for shares in shares_E]
        load_S, weight_E = [0.0] * self.num_servers, self.weights(row)
        for weight, shares in zip(weight_E, shares_E, strict=True):
            for server, share in shares.items():
                load_S[server] += share * weight
        self.load_LS[row] = load_S
        self.filled.add(row)

    def mark(self) -> int:
        """A point to which `undo` can go back."""
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Take back every `set_shares` since the mark."""
        while len(self._journal) > mark:
            row, expert, old = self._journal.pop()
            self.set_shares(row, expert, old)
            self._journal.pop()

    # ------------------------------------------------------------------ parts

    def _read(self, current: Copies) -> None:
        """The columns of the current copies on our servers, ordered by layer, and what follows from them."""
        rows = {layer: row for row, layer in enumerate(self.inputs.layers)}
        index = self.index
        held = [copy for copies in current.values() for copy in copies]
        times_K = [len(copies) for copies in current.values()]  # K keys
        layer_C = np.repeat(np.array([rows.get(layer, -1) for layer, _ in current], dtype=np.int64), times_K)
        expert_C = np.repeat(np.array([expert for _, expert in current], dtype=np.int64), times_K)
        server_C = np.array([index.get(copy.server_id, -1) for copy in held], dtype=np.int64)
        share_C = np.array([copy.share for copy in held], dtype=np.float64)
        known_C = (layer_C >= 0) & (expert_C < self.num_experts) & (server_C >= 0)
        self.whole = bool(known_C.all())  # every current copy may stay where it is
        cell_C = layer_C * self.num_experts + expert_C
        order_C = np.flatnonzero(known_C)
        if (np.diff(cell_C) < 0).any():
            order_C = order_C[np.argsort(cell_C[order_C], kind="stable")]
        cell_C = cell_C[order_C]
        self._layer_C, self._expert_C, self._server_C = layer_C[order_C], expert_C[order_C], server_C[order_C]
        cells, shape = self.num_layers * self.num_experts, (self.num_layers, self.num_experts)
        sum_X = np.bincount(cell_C, weights=share_C[order_C], minlength=cells)
        self._share_C = share_C[order_C] / sum_X[cell_C]
        self.rescaled_LE = (np.abs(sum_X - 1) > 1e-9).reshape(shape)
        self.count_LE = np.bincount(cell_C, minlength=cells).reshape(shape)
        self.free_S = self.budget_S - np.bincount(self._server_C, minlength=self.num_servers)
        load_X = np.bincount(
            self._layer_C * self.num_servers + self._server_C,
            weights=self._share_C * self.weight_LE[self._layer_C, self._expert_C],
            minlength=self.num_layers * self.num_servers,
        )
        # Counts of nothing are whole numbers, weights or not: loads never are.
        self.load_LS = load_X.astype(np.float64).reshape(self.num_layers, self.num_servers)

    def _blocked(self) -> frozenset[tuple[int, int, int]]:
        rows = {layer: row for row, layer in enumerate(self.inputs.layers)}
        return frozenset(
            (rows[layer], expert, self.index[server_id])
            for (layer, expert), server_id in self.inputs.blocked
            if layer in rows and server_id in self.index
        )
