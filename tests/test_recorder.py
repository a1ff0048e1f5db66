"""The router's trace: what gates decided, all of it or a sample, in bounded memory and disk, whatever the disk does."""

import logging
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.traces import RoutingTrace, load_matrix
from protos.tracefile import TraceInfo
from router import recorder
from router.client import RouterClient
from router.config import RouterConfig
from router.gate import Routing
from router.recorder import Recorder
from tests.mesh import Mesh, mesh
from tests.tiny_models import DIM, NUM_EXPERTS, TOP_K, tiny_model

INFO = TraceInfo(model="m", layers=("0", "1"), num_experts=8, num_choices=8, top_k=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2_moe", tmp_path_factory.mktemp("models") / "qwen2_moe")


def states(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(seed))


def routing(num_tokens: int, seed: int = 0) -> Routing:
    rng = np.random.default_rng(seed)
    expert_TK = np.stack([rng.permutation(8)[:2] for _ in range(num_tokens)]).astype(np.int32)
    return Routing(expert_TK=expert_TK, weight_TK=rng.random((num_tokens, 2), dtype=np.float32))


def until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)


def size_of(directory: Path) -> int:
    """The least of three sums: files come and go while one adds up."""

    def once() -> int:
        total = 0
        for path in directory.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    return min(once() for _ in range(3))


# ---------------------------------------------------------------------- behind a real router


async def forward(served: Mesh, *, requests: int, num_tokens: int = 50) -> list[Routing]:
    """The routing of so many requests, layer after layer."""
    found = []
    async with RouterClient(served.router.address) as client:
        for number in range(requests):
            layer = served.spec.layers[number % len(served.spec.layers)]
            answer = await client.forward(layer, states(num_tokens, seed=number), return_routing=True)
            assert answer.routing is not None
            found.append(answer.routing)
    return found


async def test_everything_a_router_s_gates_decide_is_in_its_trace(model: Path, tmp_path: Path) -> None:
    began_s = time.time()
    with mesh(model, router=RouterConfig(trace_dir=str(tmp_path), trace_share=1.0)) as served:
        routings = await forward(served, requests=6)
        demand = served.router.report().demand
        spec = served.spec
    trace = RoutingTrace(tmp_path)
    assert trace.info == TraceInfo(
        model=str(spec.path),
        layers=spec.layers,
        num_experts=NUM_EXPERTS,
        num_choices=NUM_EXPERTS,
        top_k=TOP_K,
        sampled_share=1.0,
    )
    [batch] = list(trace.batches())
    for row, layer in enumerate(spec.layers):
        here_T = batch.layer_T == row
        here_P = here_T[batch.rows()]
        ours = routings[row :: len(spec.layers)]
        assert batch.token_T[here_T].tolist() == list(range(50 * len(ours)))
        assert (
            batch.expert_P[here_P].tolist() == np.concatenate([routing.expert_TK for routing in ours]).ravel().tolist()
        )
        assert batch.weight_P[here_P] == pytest.approx(np.concatenate([r.weight_TK for r in ours]).ravel())
        counted = Counter(batch.expert_P[here_P].tolist())
        assert {(layer, expert): count for expert, count in counted.items()} == {
            key: count for key, count in demand.items() if key[0] == layer
        }
    assert began_s <= batch.time_s_T.min() <= batch.time_s_T.max() <= time.time()


async def test_a_router_that_records_nothing_has_nothing_of_it(model: Path) -> None:
    with mesh(model) as served:
        await forward(served, requests=2)
        report = served.router.report()
    assert (report.traced_tokens, report.trace_dropped_tokens) == (0, 0)
    code = "import sys, router.service, router.__main__; print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@contextmanager
def full_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A file system of 1 MiB without a free byte (where we may mount one, else a limit on file sizes); gives space."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        filler = path / "filler"
        try:
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(2 << 20))
            yield filler.unlink
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_a_full_disk_costs_trace_and_one_warning_but_no_request(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.05)
    caplog.set_level(logging.INFO, logger="expertmesh.router")
    settings = RouterConfig(trace_dir=str(tmp_path / "disk"), trace_share=1.0, trace_file_s=0.02)
    with full_disk(tmp_path / "disk") as give_space:
        with mesh(model, router=settings) as served:
            for dropped in (1, 101, 201):
                await forward(served, requests=2)
                until(lambda least=dropped: served.router.report().trace_dropped_tokens >= least)  # type: ignore[misc]
            assert served.router.report().traced_tokens == 0
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(warnings) == 1
            assert "tokens not recorded, serving goes on: " in warnings[0].getMessage()
            give_space()
            await forward(served, requests=2)
            until(lambda: served.router.report().traced_tokens >= 100)
            totals = served.router.report().totals
            report = served.router.report()
        assert (totals.requests, totals.failed_requests) == (8, 0)
        assert report.traced_tokens + report.trace_dropped_tokens == 400
        assert RoutingTrace(tmp_path / "disk").num_tokens == report.traced_tokens
        assert not list((tmp_path / "disk").glob(".*"))


# ---------------------------------------------------------------------- the recorder by itself


def record(
    directory: Path, blocks: int, *, max_bytes: int = 1 << 24, share: float = 1.0, tokens: int = 200
) -> Recorder:

    ours = Recorder(replace(INFO, sampled_share=share), directory, max_bytes=max_bytes, file_s=60.0)
    given = routing(tokens)
    for _ in range(blocks):
        ours.record("0", given)
        ours.record("1", given)
    return ours


def test_a_sample_has_its_share_and_says_so(tmp_path: Path) -> None:
    ours = record(tmp_path, 100, share=0.1, tokens=500)
    ours.close()
    trace = RoutingTrace(tmp_path)
    assert trace.num_tokens == ours.recorded_tokens
    assert trace.num_tokens == pytest.approx(10_000, rel=0.1)
    tokens = np.concatenate([batch.token_T[batch.layer_T == 0] for batch in trace.batches()])
    assert len(set(tokens.tolist())) == len(tokens)
    assert tokens.max() > 45_000
    [(_, load_LE)] = load_matrix(trace)
    first_s, last_s = trace.span_s
    assert load_LE.sum() * (last_s - first_s) == pytest.approx(200_000, rel=0.1)


def test_the_oldest_files_go_when_the_directory_is_full(tmp_path: Path) -> None:
    limit = 1 << 20
    (tmp_path / "routing-0000000000000-1-ab-000001.parquet").write_bytes(bytes(200_000))  # of a router before
    (tmp_path / ".routing-0000000000001-1-ab-000002.parquet.partial").write_bytes(bytes(200_000))  # and its death
    (tmp_path / "notes.txt").write_text("not ours")
    ours = Recorder(INFO, tmp_path, max_bytes=limit, file_s=60.0)
    for number in range(120):
        ours.record("0", routing(1000, seed=number % 7))
        assert size_of(tmp_path) <= limit
        until(lambda sent=1000 * (number + 1): ours.recorded_tokens + 3000 > sent)  # type: ignore[misc]
    ours.close()
    assert ours.dropped_tokens == 0
    assert ours.recorded_tokens == 120_000
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "notes.txt"
    assert "routing-0000000000000-1-ab-000001.parquet" not in names
    assert ".routing-0000000000001-1-ab-000002.parquet.partial" not in names
    trace = RoutingTrace(tmp_path)
    tokens = np.concatenate([batch.token_T for batch in trace.batches()])
    assert tokens.tolist() == list(range(120_000 - len(tokens), 120_000)), "the newest, without a gap"
    assert limit / 4 < size_of(tmp_path) <= limit


def test_a_writer_that_cannot_keep_up_costs_the_oldest_tokens_and_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way of the directory")
    monkeypatch.setattr(recorder, "RETRY_S", 30.0)
    ours = record(blocked / "traces", 1000)  # the first attempt fails, the next one would come in 30 s
    assert ours._in_ring <= recorder.RING_TOKENS
    blocked.unlink()
    ours.close()
    assert ours.recorded_tokens + ours.dropped_tokens == 400_000
    assert 0 < ours.recorded_tokens <= recorder.RING_TOKENS
    last = list(RoutingTrace(blocked / "traces").batches())[-1]
    assert last.token_T[-1] == 199_999


def test_a_request_s_own_routing_is_copied_not_kept(tmp_path: Path) -> None:
    ours = Recorder(INFO, tmp_path, max_bytes=1 << 24, file_s=60.0)
    given = routing(4)
    wanted = given.expert_TK.copy()
    ours.record("0", given)
    given.expert_TK[:] = 0
    ours.close()
    [batch] = list(RoutingTrace(tmp_path).batches())
    assert batch.expert_P.tolist() == wanted.ravel().tolist()
