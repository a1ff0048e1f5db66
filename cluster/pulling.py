"""What every replica needs: logs where Serve keeps them, bounded calls to the placement, steps repeated for ever."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ray.serve.handle import DeploymentHandle

log = logging.getLogger("expertmesh.cluster")

POLL_S = 1.0  # longest wait for news; bounds how long a placement that is to stop is kept busy
ANSWER_S = 3.0  # a placement that has not answered for this long is treated as away


def log_to_serve() -> None:
    """Send the log lines of our packages to the log file that Serve keeps for this replica."""
    ours, serves = logging.getLogger("expertmesh"), logging.getLogger("ray.serve")
    ours.handlers = serves.handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False


def direct(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """The handle with Serve's gRPC transport instead of Ray actor calls.

    Actor calls answer through a streaming generator whose items one thread delivers: an answer to a caller that has
    just been killed holds up everybody else's for a second, exactly when copies have to be re-placed (measured: 1.2 s
    from the loss of a server to its copies' return, 0.1 s of which were ours; 0.4 s this way).
    """
    return handle.options(_by_reference=False)


async def answer(response: Any, *, extra_s: float = 0.0) -> Any:
    """The placement's answer to a call over its Serve handle.

    Raises:
        TimeoutError: none within ANSWER_S + extra_s.
    """
    async with asyncio.timeout(ANSWER_S + extra_s):
        return await response


async def forever(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Repeat a step. While the placement is away calls raise all kinds of errors: try again until it is back."""
    while True:
        try:
            await step()
        except Exception as err:
            log.info("%s: %s: %s", getattr(step, "__name__", step), type(err).__name__, err)
            await asyncio.sleep(0.1)


async def pause(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, but not longer than this."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
