"""Are the answers right? A sample of them is computed again in this process and compared.

An answer is right if (1) its output is what the model computes on the effective routing the router reports, lossy
steps included, (2) where its ledger says that nothing was lossy, that routing is the one asked for: the request's own
or the gate's, and (3) its ledger adds up. Experts whose gate scores differ by rounding may stand for each other.
"""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cluster.local_layer import LocalLayer
from cluster.traffic import Work
from cluster.verify import relative_error, tolerance_of
from experts.packed import WeightDtype
from protos.checkpoint import Checkpoint
from protos.model import GateSpec, ModelSpec
from router.client import Answer
from router.gate import Gate, Routing

_TIE = (
    1e-5  # scores this close may come in another order: the router gates merged batches, whose sums round differently
)
_MAX_WAITING = 4  # answers waiting to be checked; more would hold memory and fall behind the load


@dataclass(slots=True, kw_only=True)
class Checks:
    """What became of the answers chosen for checking. `skipped`: the checker had fallen behind."""

    checked: int = 0
    wrong: int = 0
    skipped: int = 0
    largest_error: float = 0.0
    first_wrong: str = ""


class Checker:
    """Checks a share of the answers on a thread of its own.

    Args:
        spec: the model the router serves, readable here.
        share: of the answers to check, 0..1.
        weight_dtype: in which the router's servers keep packed experts.
    """

    def __init__(
        self, spec: ModelSpec, *, share: float, weight_dtype: WeightDtype | None = None, seed: int = 0
    ) -> None:
        self.checks = Checks()
        self._tolerance = tolerance_of(spec, weight_dtype)
        self._spec, self._share = spec, share
        self._random = random.Random(seed)
        self._layers: dict[str, LocalLayer] = {}
        self._gates: dict[str, Gate] = {}
        self._checkpoint = Checkpoint(spec)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expertmesh-check")
        self._open: set[asyncio.Future[None]] = set()

    def choose(self) -> bool:
        """Whether to check the next request's answer: it then has to ask for its routing."""
        return self._random.random() < self._share

    def submit(self, work: Work, answer: Answer, on_checked: Callable[[str], None] = lambda problem: None) -> None:
        """Check an answer soon; `on_checked` gets what is wrong with it, "" if nothing is."""
        if len(self._open) >= _MAX_WAITING:
            self.checks.skipped += 1
            return
        loop = asyncio.get_running_loop()

        async def check() -> None:
            error, problem = await loop.run_in_executor(self._thread, self.examine, work, answer)
            self.checks.checked += 1
            self.checks.largest_error = max(self.checks.largest_error, error)
            if problem:
                self.checks.wrong += 1
                self.checks.first_wrong = self.checks.first_wrong or problem
            on_checked(problem)

        task = loop.create_task(check())
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def close(self) -> None:
        """Finish the checks that wait."""
        while self._open:
            await asyncio.wait(self._open)
        self._thread.shutdown()

    def examine(self, work: Work, answer: Answer) -> tuple[float, str]:
        """(relative error, what is wrong or "") of one answer, which must carry its routing."""
        assert answer.routing is not None, "a checked request asks for its routing"
        layer = self._layers.get(work.layer)
        if layer is None:
            layer = self._layers[work.layer] = LocalLayer(self._spec, work.layer)
            self._gates[work.layer] = Gate(self._spec.blocks[work.layer].gate, self._checkpoint.gate(work.layer))
        reference_TD, _ = layer(work.x_TD, answer.routing)
        error = relative_error(answer.y_TD, reference_TD)
        where = f"layer {work.layer}, {len(work.x_TD)} tokens, epoch {answer.ledger.epoch}"
        tolerance = self._tolerance
        if not error <= tolerance:
            return error, f"{where}: relative error {error:.2e} exceeds {tolerance:.0e}"
        problem = _ledger_problem(answer, self._spec.blocks[work.layer].gate)
        if not problem and not answer.ledger.rerouted and not answer.ledger.dropped:
            problem = self._routing_problem(work, answer.routing)
        return error, f"{where}: {problem}" if problem else ""

    def _routing_problem(self, work: Work, routing: Routing) -> str:
        if work.routing is not None:
            same = np.array_equal(work.routing.expert_TK, routing.expert_TK) and np.array_equal(
                work.routing.weight_TK, routing.weight_TK
            )
            return "" if same else "the ledger says nothing was lossy, but the routing is not the request's"
        own = self._gates[work.layer](work.x_TD, with_scores=True)
        assert own.choice_TE is not None, "asked for above"
        chosen_TK, own_TK = (
            np.sort(np.take_along_axis(own.choice_TE, r.expert_TK.astype(np.int64), axis=1), axis=1)
            for r in (routing, own)
        )
        if np.abs(chosen_TK - own_TK).max() > _TIE:
            return "the ledger says nothing was lossy, but the routing is not the gate's"
        return ""


def _ledger_problem(answer: Answer, gate: GateSpec) -> str:
    """What the counts of a ledger and the routing beside it have against each other, or ""."""
    ledger, routing = answer.ledger, answer.routing
    assert routing is not None, "a checked request asks for its routing"
    absent = int((routing.expert_TK < 0).sum())
    # Choices that no server was asked for: identity experts, and what the model's own capacity left out.
    local = int((routing.expert_TK >= gate.num_experts).sum())
    if gate.capacity is not None:
        local += max(absent - ledger.dropped, 0)
        absent = min(absent, ledger.dropped)
    pairs = routing.expert_TK.size - local
    if ledger.pairs != pairs or ledger.pairs != ledger.computed + ledger.dropped:
        return (
            f"ledger has {ledger.pairs} pairs, {ledger.computed} computed and {ledger.dropped} dropped, "
            f"the routing {pairs} pairs"
        )
    if absent != ledger.dropped:
        return f"ledger has {ledger.dropped} dropped pairs, the routing {absent}"
    return ""
