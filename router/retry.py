"""The next move after a call to an expert server failed: a pure table from error class to move."""

from enum import Enum, auto

from protos.errors import ExpertmeshError, InternalError, Overloaded, StalePlacement, Unavailable


class Move(Enum):
    """What the router does with the pairs of a failed call."""

    ELSEWHERE = auto()  # the server cannot do it now: other copies, else wait for a new placement
    OVERFLOW = auto()  # the server is full: other copies, else the overflow chain
    FAIL = auto()  # no other server would do better: fail the requests


def next_move(error: ExpertmeshError) -> Move:
    """Decide by the error's class.

    InternalError counts as the server's own fault (a crash of one launch, nonsense on the wire): another copy may do
    better, and where there is none the deadline bounds the wait. InvalidRequest and the rest would fail anywhere.
    """
    if isinstance(error, Overloaded):
        return Move.OVERFLOW
    if isinstance(error, StalePlacement | Unavailable | InternalError):
        return Move.ELSEWHERE
    return Move.FAIL


def retry_pause_s(retry_after_s: float, *, attempt: int, jitter: float) -> float:
    """How long refused pairs wait before they are offered again.

    Args:
        retry_after_s: the server's hint, 0 for none.
        attempt: refusals of these pairs so far, from 1: without a hint the pause doubles from 10 ms up to 0.5 s.
        jitter: a draw from 0..1; the pause grows by up to half, so that routers do not come back in step.
    """
    pause_s = max(retry_after_s, min(0.5, 0.01 * 2.0 ** (attempt - 1)))
    return pause_s * (1 + 0.5 * jitter)
