"""A deployed cluster, and checked load on it: every answer is compared with the transformers block."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster import app
from cluster.config import ClusterConfig, parse_config
from protos.checkpoint import Checkpoint, read_model
from protos.errors import ExpertmeshError
from protos.model import ModelSpec
from router.client import RouterClient
from router.gate import Gate
from tests.tiny_models import load_reference, reference_block

TOLERANCE = 1e-5


@dataclass(slots=True)
class Batches:
    """Inputs with the outputs they must give, per layer."""

    spec: ModelSpec
    items: list[tuple[str, Tensor, Tensor]]

    def where(self, keep: Callable[[str, npt.NDArray[np.int32]], npt.NDArray[np.bool_]], *, rows: int) -> "Batches":
        """Batches of `rows` tokens picked by keep(layer, expert_TK), from random hidden states."""
        return make_batches(self.spec, keep=keep, rows=rows)


def make_batches(
    spec: ModelSpec,
    *,
    keep: Callable[[str, npt.NDArray[np.int32]], npt.NDArray[np.bool_]] | None = None,
    rows: int = 16,
    per_layer: int = 4,
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Batches:
    """Random hidden states, optionally only those that the gate sends where `keep` wants them."""
    model = load_reference(spec.path)
    checkpoint = Checkpoint(spec)
    generator = torch.Generator().manual_seed(seed)
    items = []
    for layer in layers or spec.layers:
        x_ND = torch.randn(4096, spec.dim, generator=generator)
        if keep is not None:
            routing = Gate(spec.blocks[layer].gate, checkpoint.gate(layer))(x_ND)
            x_ND = x_ND[torch.from_numpy(keep(layer, routing.expert_TK))]
        assert len(x_ND) >= rows, f"only {len(x_ND)} of 4096 random tokens fit"
        for i in range(per_layer):
            x_TD = x_ND[torch.arange(i * rows, (i + 1) * rows) % len(x_ND)]
            with torch.no_grad():
                found = reference_block(model, layer)(x_TD[None])
            y_TD = (found[0] if isinstance(found, tuple) else found).reshape(rows, -1)
            items.append((layer, x_TD, y_TD))
    return Batches(spec=spec, items=items)


@dataclass(slots=True)
class Account:
    """What a load saw."""

    answered: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    retried: int = 0
    epochs: list[int] = field(default_factory=list)
    slowest_s: float = 0.0

    def assert_clean(self) -> None:
        assert not self.errors, f"{len(self.errors)} failed of {self.answered}: {self.errors[:3]}"
        assert not self.wrong, f"{self.wrong} wrong answers of {self.answered}"
        assert self.answered


@asynccontextmanager
async def load(address: str, batches: Batches, *, concurrency: int, pause_s: float = 0.0) -> AsyncIterator[Account]:
    """Send batches round robin from `concurrency` tasks while the block runs; every answer is checked."""
    account, stopping = Account(), asyncio.Event()

    async def work(client: RouterClient, first: int) -> None:
        turn = first
        while not stopping.is_set():
            layer, x_TD, y_TD = batches.items[turn % len(batches.items)]
            turn += 1
            started_s = time.monotonic()
            try:
                answer = await client.forward(layer, x_TD, timeout_s=20)
            except ExpertmeshError as err:
                account.errors.append(f"{type(err).__name__}: {err}")
                await asyncio.sleep(0.05)
                continue
            account.answered += 1
            account.slowest_s = max(account.slowest_s, time.monotonic() - started_s)
            account.retried += answer.ledger.retried
            account.epochs.append(answer.ledger.epoch)
            scale = float(y_TD.abs().max())
            account.wrong += float((answer.y_TD - y_TD).abs().max()) > TOLERANCE * scale
            if pause_s:
                await asyncio.sleep(pause_s)

    async with RouterClient(address) as client:
        tasks = [asyncio.create_task(work(client, first)) for first in range(concurrency)]
        try:
            yield account
        finally:
            stopping.set()
            await asyncio.gather(*tasks)


@dataclass(slots=True)
class Cluster:
    """A deployed application."""

    config: ClusterConfig
    spec: ModelSpec

    async def status(self) -> dict[str, Any]:
        return await app.status(self.config.name)

    async def until(
        self, condition: Callable[[dict[str, Any]], Any], what: str, *, timeout_s: float = 60.0
    ) -> tuple[dict[str, Any], float]:
        """Poll the status until it fulfils the condition; returns it and the seconds it took."""
        started_s = time.monotonic()
        found: dict[str, Any] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        found = await self.status()
                    except Exception:  # the placement may be away: that is what some tests are about
                        await asyncio.sleep(0.05)
                        continue
                    if condition(found):
                        return found, time.monotonic() - started_s
                    await asyncio.sleep(0.02)
        except TimeoutError:
            brief = {name: found.get(name) for name in ("epoch", "settled", "servers", "events", "missing_experts")}
            raise AssertionError(f"not within {timeout_s} s: {what}; last status {brief}") from None


@contextmanager
def deployed(model: Path, **fields: Any) -> Iterator[Cluster]:
    """Deploy, wait until ready, and delete at the end."""
    config = parse_config({"model": str(model), **fields})
    app.deploy(config)
    try:
        asyncio.run(app.wait_until_ready(config.name, timeout_s=60))
        yield Cluster(config=config, spec=read_model(model))
    finally:
        app.remove(config.name)


def serving(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The servers that take traffic and hold copies."""
    return [server for server in status["servers"] if server["state"] == "serving" and server["copies"]]


def copies_of(status: dict[str, Any], layer: str, expert: int) -> int:
    found = [entry["copies"] for entry in status["experts"] if (entry["layer"], entry["expert"]) == (layer, expert)]
    return found[0] if found else 0
