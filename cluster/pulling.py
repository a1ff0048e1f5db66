"""What every replica that pulls from the placement needs: bounded calls, and steps repeated for ever."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("expertmesh.cluster")

POLL_S = 1.0  # longest wait for news; bounds how long a placement that is to stop is kept busy
ANSWER_S = 3.0  # a placement that has not answered for this long is treated as away


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
