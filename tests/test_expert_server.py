"""One expert server over real gRPC: what it computes, refuses, bounds and reports."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from experts.__main__ import main as experts_main
from experts.compute import choose_compute_dtype, partial_sums
from experts.config import ExpertServerConfig
from experts.service import ExpertServer
from experts.weights import load_expert
from protos import common_pb2, expert_pb2
from protos.checkpoint import Checkpoint, read_model
from protos.codec import decode, encode, read_tensor, tensor_bytes
from protos.errors import (
    CorruptWeights,
    DeadlineExceeded,
    ExpertmeshError,
    InvalidRequest,
    Overloaded,
    StalePlacement,
    from_proto,
)
from protos.model import ModelSpec
from protos.services import EXPERT_SERVICE, compute_stream, status_method
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_model(tiny_model("mixtral", tmp_path_factory.mktemp("model")))


@contextmanager
def serving(spec: ModelSpec, config: ExpertServerConfig | None = None) -> Iterator[ExpertServer]:
    """A server that holds experts 0..3 of the first layer."""
    server = ExpertServer(spec, config or ExpertServerConfig(), server_id="tested")
    server.load([(spec.layers[0], expert) for expert in range(4)])
    server.start("127.0.0.1")
    try:
        yield server
    finally:
        server.stop(grace_s=1)


class Caller:
    """Speaks the Compute stream by hand."""

    def __init__(self, server: ExpertServer) -> None:
        self._channel = grpc.aio.insecure_channel(server.address)
        self.stream = compute_stream(self._channel)
        self._next = 1

    async def send(
        self, spec: ModelSpec, x_RD: torch.Tensor, pairs: list[tuple[int, int, float]], **fields: Any
    ) -> int:
        row_P, expert_P, weight_P = zip(*pairs, strict=True) if pairs else ((), (), ())
        head = expert_pb2.ComputeRequest(
            call_id=self._next,
            layer=spec.layers[0],
            num_rows=len(x_RD),
            dtype=common_pb2.DTYPE_FLOAT32,
            partial_dtype=common_pb2.DTYPE_FLOAT32,
            pair_row=np.array(row_P, dtype=np.int32).tobytes(),
            pair_expert=np.array(expert_P, dtype=np.int32).tobytes(),
            pair_weight=np.array(weight_P, dtype=np.float32).tobytes(),
        )
        for name, value in fields.items():
            setattr(head, name, value)
        self._next += 1
        await self.stream.write(encode(head, tensor_bytes(x_RD)))
        return head.call_id

    async def receive(self) -> tuple[expert_pb2.ComputeResponse, memoryview]:
        """The next answer, pulses skipped."""
        while True:
            buffer = await asyncio.wait_for(self.stream.read(), 10)
            if buffer:
                return decode(expert_pb2.ComputeResponse, buffer)

    async def error(self) -> ExpertmeshError:
        head, _ = await self.receive()
        assert head.HasField("error")
        return from_proto(head.error)

    async def close(self) -> None:
        self.stream.cancel()
        await self._channel.close()


def expected(spec: ModelSpec, x_RD: torch.Tensor, pairs: list[tuple[int, int, float]]) -> torch.Tensor:
    y_RD, checkpoint = torch.zeros_like(x_RD), Checkpoint(spec)
    for row, expert, weight in pairs:
        w = checkpoint.expert(spec.layers[0], expert)
        gate_FD, up_FD = w.up_IL.chunk(2)
        hidden = torch.nn.functional.silu(x_RD[row] @ gate_FD.T) * (x_RD[row] @ up_FD.T)
        y_RD[row] += weight * (hidden @ w.down_LF.T)
    return y_RD


async def test_returns_one_weighted_sum_per_row(spec: ModelSpec) -> None:
    with serving(spec) as server:
        caller = Caller(server)
        x_RD = torch.randn(5, spec.dim)
        pairs = [(0, 1, 0.5), (0, 3, 0.25), (2, 0, 1.0), (4, 1, -0.5), (4, 2, 2.0)]
        await caller.send(spec, x_RD, pairs)
        head, payload = await caller.receive()
        partial = read_tensor(payload, head.dtype, (5, spec.dim), name="partial")
        torch.testing.assert_close(partial, expected(spec, x_RD, pairs), rtol=1e-5, atol=1e-6)
        assert server.report().tokens[spec.layers[0], 1] == 2
        await caller.close()


async def test_calls_that_arrive_together_share_a_launch(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=200)) as server:
        caller = Caller(server)
        x_RD = torch.randn(2, spec.dim)
        for _ in range(6):
            await caller.send(spec, x_RD, [(0, 1, 1.0), (1, 2, 1.0)])
        launches = [(await caller.receive())[0].launch_rows for _ in range(6)]
        assert max(launches) > 2
        await caller.close()


@pytest.mark.parametrize(
    ("pairs", "fields", "error", "message"),
    [
        ([(0, 0, 1.0)], {"layer": "77"}, InvalidRequest, "layer '77' is not a MoE layer"),
        ([(0, 8, 1.0)], {}, InvalidRequest, "expert 8 of layer 0 is outside 0..7"),
        ([(0, 5, 1.0)], {}, StalePlacement, "expert 5 of layer 0 is not held"),
        ([(3, 0, 1.0)], {}, InvalidRequest, "pair_row has 3..3, limit is 0..1"),
        ([(0, 0, 1.0)], {"num_rows": 0}, InvalidRequest, "num_rows is 0"),
        ([(0, 0, 1.0)], {"num_rows": 3}, InvalidRequest, "x has .* bytes"),
        ([], {}, InvalidRequest, "pair_row is empty"),
        ([(0, 0, 1.0)], {"dtype": common_pb2.DTYPE_UNSPECIFIED}, InvalidRequest, "x.dtype is 0"),
        ([(0, 0, 1.0)], {"pair_weight": b"123"}, InvalidRequest, "pair_weight has 3 bytes"),
    ],
)
async def test_a_bad_call_is_refused_by_name_and_the_stream_lives(
    spec: ModelSpec,
    pairs: list[tuple[int, int, float]],
    fields: dict[str, Any],
    error: type[ExpertmeshError],
    message: str,
) -> None:
    with serving(spec) as server:
        caller = Caller(server)
        await caller.send(spec, torch.zeros(2, spec.dim), pairs, **fields)
        refusal = await caller.error()
        assert type(refusal) is error
        with pytest.raises(error, match=message):
            raise refusal
        await caller.send(spec, torch.zeros(2, spec.dim), [(0, 0, 1.0)])
        head, _ = await caller.receive()
        assert not head.HasField("error")
        await caller.close()


async def test_garbage_on_the_stream_is_answered_not_fatal(spec: ModelSpec) -> None:
    with serving(spec) as server:
        caller = Caller(server)
        await caller.stream.write(b"\xff\xff\xff garbage")
        assert isinstance(await caller.error(), InvalidRequest)
        await caller.send(spec, torch.zeros(1, spec.dim), [(0, 0, 1.0)])
        assert not (await caller.receive())[0].HasField("error")
        await caller.close()


async def test_a_full_queue_refuses_with_a_retry_hint_and_recovers(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(max_queue_tokens=8, emulated_tokens_per_s=100)) as server:
        caller = Caller(server)
        for _ in range(30):
            await caller.send(spec, torch.zeros(4, spec.dim), [(row, 0, 1.0) for row in range(4)])
        outcomes = [(await caller.receive())[0] for _ in range(30)]
        refusals = [from_proto(head.error) for head in outcomes if head.HasField("error")]
        assert all(isinstance(refusal, Overloaded) for refusal in refusals)
        assert 0 < len(refusals) < 30
        await caller.send(spec, torch.zeros(4, spec.dim), [(row, 0, 1.0) for row in range(8 // 2)])
        assert not (await caller.receive())[0].HasField("error")
        assert server.report().queue_tokens == 0
        await caller.close()


async def test_queued_work_past_its_deadline_is_discarded(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=20)) as server:
        caller = Caller(server)
        await caller.send(spec, torch.zeros(4, spec.dim), [(row, 0, 1.0) for row in range(4)])
        late = await caller.send(spec, torch.zeros(1, spec.dim), [(0, 0, 1.0)], timeout_s=0.01)
        answers = {}
        for _ in range(2):
            head, _ = await caller.receive()
            answers[head.call_id] = head
        assert isinstance(from_proto(answers[late].error), DeadlineExceeded)
        await caller.close()


async def test_a_cancelled_call_and_a_broken_stream_leave_the_queue(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=20)) as server:
        caller, other = Caller(server), Caller(server)
        await caller.send(spec, torch.zeros(4, spec.dim), [(row, 0, 1.0) for row in range(4)])
        ids = [await caller.send(spec, torch.zeros(1, spec.dim), [(0, 1, 1.0)] * 5) for _ in range(4)]
        await other.send(spec, torch.zeros(1, spec.dim), [(0, 2, 1.0)] * 7)
        await caller.stream.write(expert_pb2.ComputeRequest(cancel=ids).SerializeToString())
        await other.close()
        deadline = time.monotonic() + 5
        while server.report().queue_tokens > 4 and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        assert server.report().queue_tokens <= 4
        await caller.close()


async def test_a_server_with_a_long_queue_sends_pulses(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=4)) as server:
        caller = Caller(server)
        await caller.send(spec, torch.zeros(4, spec.dim), [(row, 0, 1.0) for row in range(4)])
        assert await asyncio.wait_for(caller.stream.read(), 0.8) == b""
        await caller.close()


async def test_emulation_paces_the_server_and_says_so(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=500)) as server:
        caller = Caller(server)
        start = time.monotonic()
        for _ in range(5):
            await caller.send(spec, torch.zeros(20, spec.dim), [(row, 0, 1.0) for row in range(20)])
        heads = [(await caller.receive())[0] for _ in range(5)]
        assert time.monotonic() - start >= 100 / 500 * 0.95
        assert all(head.emulated for head in heads)
        assert server.report().busy_share > 0.1
        await caller.close()


async def test_unload_keeps_accepted_work_and_refuses_new(spec: ModelSpec) -> None:
    with serving(spec, ExpertServerConfig(emulated_tokens_per_s=50)) as server:
        caller = Caller(server)
        x_RD = torch.randn(5, spec.dim)
        first = await caller.send(spec, x_RD, [(row, 0, 1.0) for row in range(5)])
        second = await caller.send(spec, x_RD, [(0, 1, 1.0)])
        while server.report().queue_tokens < 6:
            await asyncio.sleep(0.001)
        server.unload([(spec.layers[0], expert) for expert in range(4)])
        assert server.report().bytes == 0
        stale = await caller.send(spec, x_RD, [(0, 1, 1.0)])
        answers = {}
        for _ in range(3):
            head, payload = await caller.receive()
            answers[head.call_id] = (head, payload)
        assert isinstance(from_proto(answers[stale][0].error), StalePlacement)
        assert not answers[first][0].HasField("error")
        partial = read_tensor(answers[second][1], answers[second][0].dtype, (5, spec.dim), name="partial")
        torch.testing.assert_close(partial, expected(spec, x_RD, [(0, 1, 1.0)]), rtol=1e-5, atol=1e-6)
        await caller.close()


def test_a_load_beyond_the_budget_is_refused_whole(spec: ModelSpec) -> None:
    expert_bytes = spec.expert_params * 4
    server = ExpertServer(spec, ExpertServerConfig(budget_bytes=3 * expert_bytes), server_id="small")
    server.load([(spec.layers[0], expert) for expert in range(3)])
    with pytest.raises(Overloaded, match=rf"1 more copies need {4 * expert_bytes} bytes.*budget_bytes"):
        server.load([(spec.layers[0], 3)])
    server.load([(spec.layers[0], 2)])  # held already: nothing to do
    assert len(server.report().copies) == 3
    with pytest.raises(InvalidRequest, match="expert 8"):
        server.load([(spec.layers[0], 8)])


def test_a_server_reads_only_the_bytes_of_its_experts(spec: ModelSpec) -> None:
    server = ExpertServer(spec, ExpertServerConfig(), server_id="frugal")
    server.load([(spec.layers[1], 5), (spec.layers[0], 2)])
    assert server._shard.checkpoint.bytes_read == 2 * spec.expert_params * 4
    assert server.report().bytes == 2 * spec.expert_params * 4


def test_corrupt_weights_are_refused_and_what_is_loaded_keeps_serving(tmp_path: Path) -> None:
    path = tiny_model("mixtral", tmp_path)
    spec = read_model(path)
    server = ExpertServer(spec, ExpertServerConfig(), server_id="careful")
    server.load([(spec.layers[0], 0)])
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
        server.load([(layer, expert) for layer in spec.layers for expert in range(8)])
    assert (spec.layers[0], 0) in server.report().copies


async def test_status_health_and_reflection_answer(spec: ModelSpec) -> None:
    with serving(spec) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            status = await status_method(channel)(expert_pb2.StatusRequest())
            assert (status.server_id, len(status.copies), status.state) == (
                "tested",
                4,
                expert_pb2.SERVER_STATE_SERVING,
            )
            server.drain()
            status = await status_method(channel)(expert_pb2.StatusRequest())
            assert status.state == expert_pb2.SERVER_STATE_DRAINING
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=EXPERT_SERVICE)
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            async for answer in listing:
                names = {service.name for service in answer.list_services_response.service}
                assert EXPERT_SERVICE in names
                break


def test_a_port_in_use_is_named(spec: ModelSpec) -> None:
    with serving(spec) as server:
        port = int(server.address.rpartition(":")[2])
        other = ExpertServer(spec, ExpertServerConfig(), server_id="late")
        with pytest.raises(InvalidRequest, match=f"port {port} on 127.0.0.1 cannot be bound"):
            other.start("127.0.0.1", port)
        other.stop(grace_s=0)


def test_the_compute_dtype_follows_the_wish_or_the_measurement() -> None:
    device = torch.device("cpu")
    assert choose_compute_dtype("float32", torch.bfloat16, device=device, dim=8, hidden_dim=8) is torch.float32
    assert choose_compute_dtype("bfloat16", torch.float32, device=device, dim=8, hidden_dim=8) is torch.bfloat16
    assert choose_compute_dtype("auto", torch.float32, device=device, dim=8, hidden_dim=8) is torch.float32
    measured = choose_compute_dtype("auto", torch.bfloat16, device=device, dim=64, hidden_dim=64)
    assert measured in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_compute_equals_one_pair_at_a_time(spec: ModelSpec, dtype: torch.dtype) -> None:
    checkpoint, rng = Checkpoint(spec), np.random.default_rng(0)
    copies = {
        expert: load_expert(checkpoint, spec.layers[0], expert, device=torch.device("cpu"), dtype=dtype)
        for expert in range(spec.num_experts)
    }
    x_RD = torch.randn(40, spec.dim)
    pair_row_P = np.sort(rng.integers(0, 40, 100)).astype(np.int32)
    pair_expert_P = rng.integers(0, spec.num_experts, 100).astype(np.int32)
    pair_weight_P = rng.random(100, dtype=np.float32)
    grouped = torch.from_numpy(partial_sums(x_RD, pair_row_P, pair_expert_P, pair_weight_P, copies))
    single = torch.zeros(40, spec.dim)
    for row, expert, weight in zip(pair_row_P, pair_expert_P, pair_weight_P, strict=True):
        one = np.zeros(1, dtype=np.int32)
        y_1D = partial_sums(x_RD[row : row + 1], one, one + expert, np.array([weight], dtype=np.float32), copies)
        single[row] += torch.from_numpy(y_1D[0])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(grouped, single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--copies", "x"], "copies 'x' is not of the form"),
        (["MODEL", "--config", '{"budget_bytes": 0}'], "budget_bytes"),
    ],
)
def test_bad_arguments_of_the_process_are_named_with_status_2(
    spec: ModelSpec,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [str(spec.path) if argument == "MODEL" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", ["experts", *filled])
    assert experts_main() == 2
    assert message in capsys.readouterr().err
