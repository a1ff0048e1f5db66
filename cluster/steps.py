"""What a plan asks for, one copy or expert at a time. Tuples: a large model's first plan makes tens of thousands."""

from typing import Literal, NamedTuple

from cluster.messages import Key

Reason = Literal["missing", "drain", "load", "survival"]  # why a copy is loaded, most urgent first
UnloadReason = Literal["load", "drain", "surplus", "memory"]


class Load(NamedTuple):
    """A copy that a server should load.

    Args:
        reason: `missing` (no copy elsewhere, or fewer than min_copies), `drain` (the only ones are on draining
            servers), `load` (balance), `survival`.
        gain: as a share of its layer's load: what is taken off the most loaded server (`load`), or else the demand
            that gets a live copy, or one more.
    """

    key: Key
    server_id: str
    reason: Reason = "load"
    gain: float = 0.0


class Unload(NamedTuple):
    """A copy that a server should give up: it moved (`load`), its server leaves (`drain`), it no longer pays
    (`surplus`), or its bytes are needed (`memory`)."""

    key: Key
    server_id: str
    reason: UnloadReason = "load"


class Reshare(NamedTuple):
    """An expert whose copies stay where they are and divide its traffic otherwise."""

    key: Key


Step = Load | Unload | Reshare
