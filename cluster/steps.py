"""What a plan asks for, one copy or expert at a time."""

from dataclasses import dataclass
from typing import Literal

from cluster.messages import Key

Reason = Literal["missing", "drain", "load", "survival"]  # why a copy comes or goes, most urgent first


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A copy to load. `gain`: the share of its layer's load that the most loaded server is relieved of."""

    key: Key
    server_id: str
    reason: Reason = "load"
    gain: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    key: Key
    server_id: str
    reason: Reason = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshare:
    key: Key


Step = Load | Unload | Reshare
