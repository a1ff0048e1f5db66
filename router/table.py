"""The placement snapshot: which server holds a live copy of which expert, at one epoch.

A `PlacementTable` is immutable. A batch takes one snapshot and keeps it; the next table replaces it whole.

Shapes: E experts of a layer, C most copies of one expert in that layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """One expert server: `server_id` is unique per process (a restarted server has a new one)."""

    server_id: str
    address: str  # gRPC host:port


class CopyShare(NamedTuple):
    """One live copy: the server's id, and the share of the expert's traffic the planner wants there (0..1].

    A tuple, because tables hold tens of thousands and travel pickled.
    """

    server_id: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPlacement:
    """The table of one layer as arrays, for the request path.

    server_EC holds indices into the table's `servers`, -1 where an expert has fewer copies; share_EC is 0 there.
    An expert's copies come first in its row.
    """

    num_copies_E: npt.NDArray[np.int32]
    server_EC: npt.NDArray[np.int32]
    share_EC: npt.NDArray[np.float64]
    _copies: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict, repr=False)

    def copies(self, expert: int) -> tuple[list[int], list[float]]:
        """One expert's servers and shares as lists (do not change them): small loops are faster on these."""
        found = self._copies.get(expert)
        if found is None:
            count = int(self.num_copies_E[expert])
            found = (self.server_EC[expert, :count].tolist(), self.share_EC[expert, :count].tolist())
            self._copies[expert] = found
        return found

    def without(self, excluded_S: npt.NDArray[np.bool_]) -> "LayerPlacement":
        """The same layer with no copy on the servers marked in `excluded_S` (indices into the table's servers)."""
        # The extra entry answers for index -1, "no copy here".
        gone_EC = np.append(excluded_S, True)[self.server_EC]
        if (gone_EC & (self.server_EC >= 0)).any():
            order_EC = np.argsort(gone_EC, axis=1, kind="stable")
            live_EC = ~np.take_along_axis(gone_EC, order_EC, axis=1)
            return LayerPlacement(
                num_copies_E=live_EC.sum(axis=1, dtype=np.int32),
                server_EC=np.where(live_EC, np.take_along_axis(self.server_EC, order_EC, axis=1), np.int32(-1)),
                share_EC=np.where(live_EC, np.take_along_axis(self.share_EC, order_EC, axis=1), 0.0),
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementTable:
    """Where every live copy is, at one epoch.

    Args:
        epoch: grows by at least one with every change; never goes back.
        servers: every server a copy may point to.
        copies: (layer, expert) -> live copies. An expert without an entry has no live copy.
        num_experts: E, the same for all layers.
    """

    epoch: int
    servers: tuple[ServerAddress, ...]
    copies: Mapping[tuple[str, int], tuple[CopyShare, ...]]
    num_experts: int
    _layers: dict[str, LayerPlacement] = field(default_factory=dict, repr=False)

    def layer(self, layer: str) -> LayerPlacement:
        """The arrays of one layer, built at first use."""
        found = self._layers.get(layer)
        if found is None:
            found = self._layers[layer] = self._build(layer)
        return found

    def without(self, dead: frozenset[str]) -> "PlacementTable":
        """The same epoch with no copy on the servers in `dead` (ids); shares are not rescaled (they are relative)."""
        copies = {key: tuple(copy for copy in held if copy.server_id not in dead) for key, held in self.copies.items()}
        return PlacementTable(epoch=self.epoch, servers=self.servers, copies=copies, num_experts=self.num_experts)

    def _build(self, layer: str) -> LayerPlacement:
        index = {server.server_id: i for i, server in enumerate(self.servers)}
        held = [self.copies.get((layer, expert), ()) for expert in range(self.num_experts)]
        most = max(1, max((len(copies) for copies in held), default=1))
        num_copies_E = np.array([len(copies) for copies in held], dtype=np.int32)
        server_EC = np.full((self.num_experts, most), -1, dtype=np.int32)
        share_EC = np.zeros((self.num_experts, most))
        for expert, copies in enumerate(held):
            for c, copy in enumerate(copies):
                server_EC[expert, c] = index[copy.server_id]
                share_EC[expert, c] = copy.share
        return LayerPlacement(num_copies_E=num_copies_E, server_EC=server_EC, share_EC=share_EC)


def empty_table(num_experts: int) -> PlacementTable:
    """The table before any server has registered: epoch 0, no copies."""
    return PlacementTable(epoch=0, servers=(), copies={}, num_experts=num_experts)
