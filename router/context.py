"""What the batches of one router share."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from protos.model import ModelSpec
from router.around import Around
from router.config import RouterConfig
from router.gate import Gate, Routing
from router.shared import SharedExpert
from router.snapshot import PlacementSnapshot
from router.transport import Transport

# Work below this many multiply-adds (some milliseconds on one core) stays on the loop: a thread costs two hand-overs.
OFFLOAD_FLOPS = 100_000_000

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerContext:
    """One router's model, settings, placement and streams.

    Args:
        count_demand: called with (layer, pairs_E), feeds the load report.
        on_absent: called when a batch has to wait for experts without a live copy.
        record: called with (layer, routing) for the trace; None: there is none.
    """

    spec: ModelSpec
    config: RouterConfig
    gates: Mapping[str, Gate]
    shared: Mapping[str, SharedExpert]
    around: Mapping[str, Around]
    snapshot: PlacementSnapshot
    transport: Transport
    rng: np.random.Generator
    count_demand: Callable[[str, npt.NDArray[np.int64]], None]
    on_absent: Callable[[], None]
    compute_thread: Executor
    record: Callable[[str, Routing], None] | None = None

    async def compute(self, function: Callable[[], R], *, flops: int) -> R:
        """Call a torch function of about `flops` multiply-adds: here if that is short, else on the compute thread."""
        if flops < OFFLOAD_FLOPS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.compute_thread, function)
