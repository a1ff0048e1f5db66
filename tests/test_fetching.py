"""Where a server's new copies come from: the page cache, a peer over real gRPC, storage; and what may go wrong."""

import asyncio
import json
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.messages import Assignment
from experts import fetching, sending
from experts.config import ExpertServerConfig
from experts.copyform import form_of, named_tensors
from experts.pagecache import resident_share
from experts.service import ExpertServer
from experts.sources import SourceTotals
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos import expert_pb2
from protos.checkpoint import Checkpoint, read_model
from protos.codec import encode, read_tensor
from protos.errors import CorruptWeights, InvalidRequest, Overloaded, StalePlacement, from_rpc
from protos.loops import LoopThread, background_executor
from protos.model import ModelSpec
from protos.services import expert_handlers, fetch_stream
from tests.family_models import build_family
from tests.test_expert_server import Caller, expected
from tests.tiny_models import tiny_model

Chunks = AsyncIterator[bytes]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_model(tiny_model("mixtral", tmp_path_factory.mktemp("model")))


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model just written lies in the page cache; these tests want it far away."""
    monkeypatch.setattr("experts.sources.resident_share", lambda *_: 0.0)


@contextmanager
def server_of(
    spec: ModelSpec, copies: list[CopyKey], config: ExpertServerConfig | None = None
) -> Iterator[ExpertServer]:
    server = ExpertServer(spec, config or ExpertServerConfig(), server_id="holder")
    server.load(copies)
    server.start("127.0.0.1")
    try:
        yield server
    finally:
        server.stop(grace_s=1)


def all_keys(spec: ModelSpec) -> list[CopyKey]:
    return [(layer, expert) for layer in spec.layers for expert in range(spec.num_experts)]


def copies_of(server: ExpertServer) -> dict[CopyKey, ExpertCopy]:
    return dict(server._shard.held)


def assert_same_bytes(one: ExpertCopy, other: ExpertCopy) -> None:
    assert form_of(one) == form_of(other)
    for name, tensor in named_tensors(one).items():
        mine, theirs = (t.view(-1).view(torch.uint8) for t in (tensor, named_tensors(other)[name]))
        assert torch.equal(mine, theirs), name


def totals(server: ExpertServer) -> dict[str, tuple[int, int]]:
    """Source -> (copies, failures), of those with any."""
    found = {name: (t.copies, t.failures) for name, t in server.report().loaded.items()}
    return {name: counts for name, counts in found.items() if any(counts)}


# ---------------------------------------------------------------------- the same bytes, whichever source


@pytest.mark.parametrize("weight_dtype", ["compute", "int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.usefixtures("cold")
def test_a_copy_from_a_peer_is_bit_for_bit_that_of_storage(
    family: str, weight_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "CHUNK_BYTES", 3000)  # several chunks, the last of each tensor a short one
    spec = read_model(build_family(family, tmp_path, dtype="bfloat16").path)
    config = ExpertServerConfig.model_validate({"weight_dtype": weight_dtype, "compute_dtype": "bfloat16"})
    keys = all_keys(spec)
    with server_of(spec, keys, config) as holder, server_of(spec, [], config) as newcomer:
        newcomer.load(keys, {key: [holder.address] for key in keys})
        assert totals(newcomer) == {"peer": (len(keys), 0)}
        assert newcomer._shard.checkpoint.bytes_read == 0
        for key, copy in copies_of(newcomer).items():
            assert_same_bytes(copy, copies_of(holder)[key])
        assert newcomer.report().loaded["peer"].bytes == newcomer.report().bytes
    if family == "gpt_oss":
        assert copy.up_bias is not None


@pytest.mark.usefixtures("cold")
async def test_a_copy_from_a_peer_computes_at_once_and_starts_with_no_traffic(spec: ModelSpec) -> None:
    keys = [(spec.layers[0], expert) for expert in range(4)]
    with server_of(spec, keys) as holder, server_of(spec, []) as newcomer:
        newcomer.load(keys, {key: [holder.address] for key in keys})
        assert set(newcomer.report().tokens.values()) == {0}
        caller, x_RD = Caller(newcomer), torch.randn(3, spec.dim)
        pairs = [(0, 1, 0.5), (1, 3, 1.0), (2, 0, 2.0)]
        await caller.send(spec, x_RD, pairs)
        head, payload = await caller.receive()
        partial_RD = read_tensor(payload, head.dtype, (3, spec.dim), name="partial")
        torch.testing.assert_close(partial_RD, expected(spec, x_RD, pairs), rtol=1e-5, atol=1e-6)
        await caller.close()


# ---------------------------------------------------------------------- the choice


def sparse_model(path: Path) -> ModelSpec:
    """A model whose weights are holes in the file: all zero, and in no page cache until somebody reads them."""
    size, experts = 256, 8
    shapes = {"model.layers.0.mlp.gate.weight": [experts, size]} | {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": [size, size]
        for expert in range(experts)
        for name in ("gate", "up", "down")
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": size, "hidden_size": size, "num_hidden_layers": 1}
    rest = {"num_experts": experts, "num_experts_per_tok": 2, "hidden_act": "silu", "norm_topk_prob": True}
    (path / "config.json").write_text(json.dumps(config | rest))
    return read_model(path)


def test_the_page_cache_comes_before_a_peer_and_a_peer_before_storage(tmp_path: Path) -> None:
    spec = sparse_model(tmp_path)
    key = (spec.layers[0], 6)
    extent = Checkpoint(spec).expert_extents(*key)[1]
    with server_of(spec, []) as first, server_of(spec, []) as neighbour:
        assert resident_share(extent.file.path, extent.begin, extent.nbytes) < 0.5
        first.load([key])  # nobody else has it
        assert totals(first) == {"storage": (1, 0)}
        assert resident_share(extent.file.path, extent.begin, extent.nbytes) == 1.0
        neighbour.load([key], {key: [first.address]})  # the first one's reading left it in memory
        assert totals(neighbour) == {"page_cache": (1, 0)}
        with server_of(sparse_model(tmp_path / "of another node"), []) as distant:
            distant.load([key], {key: [first.address]})
            assert totals(distant) == {"peer": (1, 0)}


def test_packed_copies_come_from_a_peer_even_if_their_source_is_cached(spec: ModelSpec) -> None:
    config = ExpertServerConfig(weight_dtype="int8")
    key = (spec.layers[0], 0)
    with server_of(spec, [key], config) as holder, server_of(spec, [], config) as newcomer:
        newcomer.load([key], {key: [holder.address]})
        assert totals(newcomer) == {"peer": (1, 0)}
        newcomer.unload([key])
        newcomer.load([key])
        assert totals(newcomer) == {"peer": (1, 0), "page_cache": (1, 0)}


def test_residency_of_what_cannot_be_seen_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 20_000)
    assert resident_share(file, 5_000, 10_000) == 1.0
    assert resident_share(tmp_path / "gone", 0, 10) == 0.0
    assert resident_share(file, 19_000, 10_000) == 0.0  # shorter than it was said to be
    assert resident_share(file, 0, 0) == 0.0
    monkeypatch.setattr("experts.pagecache.os.geteuid", lambda: 1)  # Linux says "all" to those who may not know
    monkeypatch.setattr("experts.pagecache.os.access", lambda *_: False)
    assert resident_share(file, 5_000, 10_000) == 0.0


# ---------------------------------------------------------------------- peers that cannot help


@pytest.mark.usefixtures("cold")
def test_a_peer_without_the_copy_or_gone_falls_back_to_storage(
    spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [(spec.layers[0], expert) for expert in range(3)]
    with server_of(spec, keys[:1]) as holder, server_of(spec, []) as newcomer, server_of(spec, []) as gone:
        gone.stop(grace_s=0)
        with caplog.at_level(logging.WARNING, "expertmesh.experts"):
            newcomer.load(keys, {key: [gone.address, holder.address] for key in keys})
        # The peer that is gone is asked once; the one that lacks a copy may have the next one.
        assert totals(newcomer) == {"peer": (1, 3), "storage": (2, 0)}
        assert len(caplog.records) == 3
        assert sum("is not held by this server" in record.message for record in caplog.records) == 2
        for key, copy in copies_of(newcomer).items():
            assert_same_bytes(copy, newcomer._shard.read(key))


@pytest.mark.usefixtures("cold")
def test_a_peer_of_another_form_or_other_weights_is_not_used(spec: ModelSpec, tmp_path: Path) -> None:
    key = (spec.layers[0], 0)
    other_weights = read_model(tiny_model("mixtral", tmp_path, seed=1))
    bfloat16, int8 = ExpertServerConfig(compute_dtype="bfloat16"), ExpertServerConfig(weight_dtype="int8")
    with (
        server_of(spec, [key], bfloat16) as half,
        server_of(spec, [key], int8) as packed,
        server_of(other_weights, [key]) as other,
        server_of(spec, []) as newcomer,
    ):
        newcomer.load([key], {key: [half.address, packed.address, other.address]})
        assert totals(newcomer) == {"peer": (0, 3), "storage": (1, 0)}
        assert_same_bytes(copies_of(newcomer)[key], newcomer._shard.read(key))


def test_a_fingerprint_tells_weights_apart_and_not_where_they_lie(spec: ModelSpec, tmp_path: Path) -> None:
    same = read_model(tiny_model("mixtral", tmp_path / "same"))
    other = read_model(tiny_model("mixtral", tmp_path / "other", seed=1))
    assert Checkpoint(same).fingerprint == Checkpoint(spec).fingerprint
    assert Checkpoint(other).fingerprint != Checkpoint(spec).fingerprint


# ---------------------------------------------------------------------- peers that misbehave


async def _spoil_checksum(chunks: Chunks) -> Chunks:
    async for chunk in chunks:
        yield chunk[:-1] + bytes([chunk[-1] ^ 1])


async def _cut_short(chunks: Chunks) -> Chunks:
    yield await anext(chunks)


async def _too_much(chunks: Chunks) -> Chunks:
    message = expert_pb2.ExpertChunk.FromString(await anext(chunks))
    yield encode(expert_pb2.ExpertChunk(head=message.head), message.data + message.data)


async def _no_head(chunks: Chunks) -> Chunks:
    message = expert_pb2.ExpertChunk.FromString(await anext(chunks))
    yield encode(expert_pb2.ExpertChunk(), message.data)


async def _two_heads(chunks: Chunks) -> Chunks:
    first = await anext(chunks)
    yield first
    yield first


async def _empty_chunk(chunks: Chunks) -> Chunks:
    message = expert_pb2.ExpertChunk.FromString(await anext(chunks))
    yield encode(expert_pb2.ExpertChunk(head=message.head), b"")


async def _other_shape(chunks: Chunks) -> Chunks:
    message = expert_pb2.ExpertChunk.FromString(await anext(chunks))
    message.head.tensors[1].shape[:] = reversed(message.head.tensors[1].shape)
    yield message.SerializeToString()


async def _other_expert(chunks: Chunks) -> Chunks:
    message = expert_pb2.ExpertChunk.FromString(await anext(chunks))
    message.head.expert += 1
    yield message.SerializeToString()


async def _garbage(chunks: Chunks) -> Chunks:
    yield b"\xff\xff\xff garbage"


async def _stall(chunks: Chunks) -> Chunks:
    yield await anext(chunks)
    await asyncio.sleep(30)


async def _fail(chunks: Chunks) -> Chunks:
    yield await anext(chunks)
    raise RuntimeError("a bug of the peer's")


@contextmanager
def liar(honest: ExpertServer, spoil: Callable[[Chunks], Chunks]) -> Iterator[str]:
    """A gRPC server that passes on what an honest one answers, spoilt. Yields its address."""
    loop = LoopThread("liar")
    loop.start()
    servers: list[grpc.aio.Server] = []

    async def fetch(request: expert_pb2.FetchExpertsRequest, context: grpc.aio.ServicerContext) -> None:
        async with grpc.aio.insecure_channel(honest.address) as channel:
            chunks = aiter(fetch_stream(channel, request, timeout_s=5))
            async for chunk in spoil(chunks):
                await context.write(chunk)

    async def unused(*_: object) -> None:
        raise AssertionError

    async def start() -> str:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((expert_handlers(compute=unused, status=unused, fetch=fetch),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    async def stop() -> None:
        await servers[0].stop(0)

    try:
        yield loop.call(start(), 10)
    finally:
        loop.call(stop(), 10)
        loop.stop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_checksum, "have checksum"),
        (_cut_short, "ended before its last byte"),
        (_too_much, "a chunk of .* bytes"),
        (_no_head, "chunk 0 has no head"),
        (_two_heads, "chunk 1 has a head"),
        (_empty_chunk, "a chunk of 0 bytes"),
        (_other_shape, "the peer sends tensors .* expected"),
        (_other_expert, r"the peer sends \('0', 1\)"),
        (_garbage, "malformed ExpertChunk"),
        (_stall, "no chunk for 0.3 s"),
        (_fail, "a bug of the peer's"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
@pytest.mark.usefixtures("cold")
def test_a_misbehaving_peer_costs_one_log_line_and_the_copy_is_right(
    spec: ModelSpec,
    spoil: Callable[[Chunks], Chunks],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fetching, "CHUNK_TIMEOUT_S", 0.3 if spoil is _stall else 10.0)
    key = (spec.layers[0], 0)
    with server_of(spec, [key]) as honest, liar(honest, spoil) as address, server_of(spec, []) as newcomer:
        with caplog.at_level(logging.WARNING, "expertmesh.experts"):
            newcomer.load([key], {key: [address, honest.address]})
        assert totals(newcomer) == {"peer": (1, 1)}
        assert_same_bytes(copies_of(newcomer)[key], copies_of(honest)[key])
    lines = [record.message for record in caplog.records if "next source" in record.message]
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.usefixtures("cold")
def test_a_peer_that_failed_is_left_alone_for_a_while(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [(spec.layers[0], expert) for expert in range(4)]
    with server_of(spec, keys) as honest, liar(honest, _garbage) as address, server_of(spec, []) as newcomer:
        sources = {key: [address] for key in keys}
        newcomer.load(keys[:3], sources)
        assert totals(newcomer) == {"peer": (0, 1), "storage": (3, 0)}
        monkeypatch.setattr("experts.sources.time", _Later(100.0))
        newcomer.load(keys[3:], sources)
        assert totals(newcomer) == {"peer": (0, 2), "storage": (4, 0)}


class _Later:
    """A clock that is some seconds ahead."""

    def __init__(self, ahead_s: float) -> None:
        self._now, self._ahead_s = time.monotonic, ahead_s

    def monotonic(self) -> float:
        return self._now() + self._ahead_s


@pytest.mark.usefixtures("cold")
def test_storage_that_cannot_be_read_either_is_an_error_and_a_peer_helps_without_storage(tmp_path: Path) -> None:
    path = tiny_model("mixtral", tmp_path)
    spec = read_model(path)
    keys = [(spec.layers[0], expert) for expert in range(2)]
    with server_of(spec, keys) as holder, server_of(spec, []) as newcomer:
        newcomer.load(keys[:1], {keys[0]: [holder.address]})  # from now on it knows which weights these are
        (path / "model.safetensors").write_bytes(b"")
        newcomer.load(keys, {key: [holder.address] for key in keys})
        assert totals(newcomer) == {"peer": (2, 0)}
        with pytest.raises(CorruptWeights, match="changed on disk"):
            newcomer.load([(spec.layers[0], 2)], {(spec.layers[0], 2): [holder.address]})
        assert set(copies_of(newcomer)) == set(keys)


# ---------------------------------------------------------------------- the sending side


@asynccontextmanager
async def fetching_from(server: ExpertServer) -> AsyncIterator[Callable[..., grpc.aio.UnaryStreamCall]]:
    """A function that opens FetchExperts for some experts of the first layer."""
    compute_dtype, weight_dtype = server._shard.form
    layer, fingerprint = server.spec.layers[0], server._shard.checkpoint.fingerprint

    async with grpc.aio.insecure_channel(server.address) as channel:

        def fetch(*experts: int) -> grpc.aio.UnaryStreamCall:
            request = expert_pb2.FetchExpertsRequest(
                copies=[expert_pb2.ExpertKey(layer=layer, expert=expert) for expert in experts],
                compute_dtype=compute_dtype,
                weight_dtype=weight_dtype,
                fingerprint=fingerprint,
            )
            return fetch_stream(channel, request, timeout_s=30)

        yield fetch


async def refusal(call: grpc.aio.UnaryStreamCall) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return from_rpc(caught.value)


async def test_one_stream_brings_several_copies_in_the_order_asked_for(spec: ModelSpec) -> None:
    with server_of(spec, all_keys(spec)) as holder:
        async with fetching_from(holder) as fetch:
            chunks = [expert_pb2.ExpertChunk.FromString(buffer) async for buffer in fetch(5, 2, 5)]
    heads = [chunk.head for chunk in chunks if chunk.HasField("head")]
    assert [head.expert for head in heads] == [5, 2]  # each once
    assert [tensor.name for tensor in heads[0].tensors] == ["up", "down"]
    assert sum(len(chunk.data) for chunk in chunks) == 2 * holder.copy_bytes
    assert max(len(chunk.data) for chunk in chunks) <= sending.CHUNK_BYTES <= 1 << 20


async def test_a_server_refuses_what_it_does_not_hold(spec: ModelSpec) -> None:
    with server_of(spec, [(spec.layers[0], 0)]) as holder:
        async with fetching_from(holder) as fetch:
            error = await refusal(fetch(0, 3))
            assert isinstance(error, StalePlacement)
            assert "expert 3 of layer 0 is not held" in str(error)
            assert isinstance(await refusal(fetch()), InvalidRequest)


async def test_more_fetches_than_a_server_gives_at_once_are_refused_and_receivers_that_do_not_read_hold_up_nobody(
    tmp_path: Path,
) -> None:
    size, experts = 1024, 2
    tensors = {"model.layers.0.mlp.gate.weight": torch.randn(experts, size)} | {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": torch.randn(size, size) / 32
        for expert in range(experts)
        for name in ("gate", "up", "down")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": size, "hidden_size": size, "num_hidden_layers": 1}
    rest = {"num_experts": experts, "num_experts_per_tok": 2, "hidden_act": "silu", "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps(config | rest))
    spec = read_model(tmp_path)
    with server_of(spec, all_keys(spec)) as holder:
        async with fetching_from(holder) as fetch:
            open_calls = [fetch(0, 1) for _ in range(sending.MAX_FETCHES)]
            for call in open_calls:
                await call.read()  # and no further: the rest does not fit between us
            assert isinstance(await refusal(fetch(0)), Overloaded)
            caller, x_RD = Caller(holder), torch.randn(2, spec.dim)
            await caller.send(spec, x_RD, [(0, 0, 1.0), (1, 1, 1.0)])
            head, _ = await caller.receive()
            assert not head.HasField("error")
            await caller.close()
            for call in open_calls:
                call.cancel()
            while holder._sender._open:
                await asyncio.sleep(0.01)
            assert [chunk async for chunk in fetch(1)]


# ---------------------------------------------------------------------- serving while loading


@pytest.mark.usefixtures("cold")
async def test_answers_stay_right_while_copies_come_and_go(spec: ModelSpec) -> None:
    kept = [(spec.layers[0], expert) for expert in range(4)]
    moving = [key for key in all_keys(spec) if key not in kept]
    with server_of(spec, all_keys(spec)) as holder, server_of(spec, kept) as busy:
        stop = threading.Event()

        def churn() -> int:
            rounds = 0
            while not stop.is_set():
                busy.load(moving, {key: [holder.address] for key in moving[::2]})
                busy.unload(moving)
                rounds += 1
            return rounds

        churning = asyncio.create_task(asyncio.to_thread(churn))
        caller = Caller(busy)
        for number in range(40):
            x_RD = torch.randn(4, spec.dim, generator=torch.Generator().manual_seed(number))
            pairs = [(0, 1, 0.5), (0, 3, 0.25), (1, 0, 1.0), (3, 2, 2.0)]
            await caller.send(spec, x_RD, pairs)
            head, payload = await caller.receive()
            partial_RD = read_tensor(payload, head.dtype, (4, spec.dim), name="partial")
            torch.testing.assert_close(partial_RD, expected(spec, x_RD, pairs), rtol=1e-5, atol=1e-6)
        stop.set()
        rounds = await churning
        await caller.close()
        assert totals(busy) == {
            "peer": (rounds * len(moving[::2]), 0),
            "storage": (len(kept) + rounds * len(moving[1::2]), 0),
        }
        assert set(copies_of(busy)) == set(kept)


def test_background_threads_step_back_however_low_their_process_is() -> None:
    """Ray gives its workers a niceness of 15 by default; and no thread may raise its priority again."""
    found: list[int] = []

    def low(niceness: int) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        with background_executor("low") as executor:
            found.append(executor.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result())
            found.append(executor.submit(torch.get_num_threads).result())

    for niceness in (0, 15):
        thread = threading.Thread(target=low, args=(niceness,))
        thread.start()
        thread.join()
    assert found == [10, 1, 19, 1]


def test_copies_that_requests_wait_for_are_loaded_at_the_priority_of_serving(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []
    read, serving = ExpertShard.read, priority()

    def watched(shard: ExpertShard, key: CopyKey) -> ExpertCopy:
        found.append(priority() - serving)
        return read(shard, key)

    monkeypatch.setattr(ExpertShard, "read", watched)
    with server_of(spec, []) as server:
        for key, urgent in zip(all_keys(spec), (False, True, False), strict=False):
            server.load([key], urgent=urgent)
    assert found == [10, 0, 10]


def test_sources_are_no_part_of_what_an_assignment_says() -> None:
    plain = Assignment(version=3, copies=(("0", 1),))
    assert replace(plain, sources={("0", 1): ("127.0.0.1:1",)}) == plain
    assert SourceTotals().plus(10, 0.5).failed() == SourceTotals(copies=1, bytes=10, seconds=0.5, failures=1)
