"""The placement a router works with: the newest table minus the servers this router cannot reach now.

A batch takes `current` once and keeps it. `in_use` tells the control plane which epochs batches still hold, so that a
copy is unloaded only when no batch can reach for it any more.
"""

from collections import Counter
from collections.abc import Callable

from router.table import PlacementTable


class PlacementSnapshot:
    """The newest placement table, seen through this router's own links."""

    def __init__(self, table: PlacementTable) -> None:
        self._table = table
        self._usable = table
        self._unreachable: frozenset[str] = frozenset()
        self._in_use: Counter[int] = Counter()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def table(self) -> PlacementTable:
        """The table as the control plane published it."""
        return self._table

    @property
    def current(self) -> PlacementTable:
        """The table without copies on unreachable servers."""
        return self._usable

    @property
    def oldest_epoch(self) -> int:
        """The lowest epoch a batch in flight still uses; the newest one when there is none. From any thread."""
        newest = self._table.epoch
        return min(self._in_use.copy(), default=newest)

    def adopt(self, table: PlacementTable) -> bool:
        """Take a newer table; an older or equal epoch is ignored (returns False)."""
        if table.epoch <= self._table.epoch:
            return False
        self._table = table
        self._refresh()
        return True

    def set_unreachable(self, server_ids: frozenset[str]) -> None:
        """The servers whose links are lost now."""
        if server_ids != self._unreachable:
            self._unreachable = server_ids
            self._refresh()

    def hold(self, epoch: int) -> None:
        """A batch uses this epoch until `release`."""
        self._in_use[epoch] += 1

    def release(self, epoch: int) -> None:
        """The batch is done."""
        self._in_use[epoch] -= 1
        if not self._in_use[epoch]:
            del self._in_use[epoch]

    def listen(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every change of `current`, until `forget`."""
        self._listeners.add(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """End what `listen` began."""
        self._listeners.discard(callback)

    def _refresh(self) -> None:
        lost = self._unreachable & {server.server_id for server in self._table.servers}
        self._usable = self._table.without(frozenset(lost)) if lost else self._table
        for callback in list(self._listeners):
            callback()
