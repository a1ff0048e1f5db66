"""The request path over real gRPC: parity with transformers, overflow accounting, failures."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from cluster.local_layer import LocalLayer
from experts.config import ExpertServerConfig
from protos import router_pb2
from protos.errors import (
    DeadlineExceeded,
    Draining,
    ExpertmeshError,
    InvalidRequest,
    NoCopy,
    Overloaded,
    Unavailable,
)
from protos.model import ModelSpec
from protos.services import ROUTER_SERVICE
from router.client import RouterClient
from router.config import OverflowConfig, RouterConfig
from router.gate import Routing
from router.ledger import RequestLedger
from tests.mesh import mesh, split_copies
from tests.tiny_models import FAMILIES, load_reference, reference_block, tiny_model

TOLERANCE = 1e-5  # fp32, relative to the largest reference value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2_moe", tmp_path_factory.mktemp("model"))


def random_states(num_tokens: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_balanced(ledger: RequestLedger) -> None:
    assert ledger.pairs == ledger.computed + ledger.dropped
    assert ledger.copied + ledger.waited + ledger.rerouted <= ledger.computed


@pytest.mark.parametrize("family", FAMILIES)
async def test_answers_equal_the_transformers_block_whatever_the_number_of_servers_and_copies(
    family: str, tmp_path: Path
) -> None:
    path = tiny_model(family, tmp_path)
    oracle = load_reference(path)
    for num_servers, doubled in ((1, False), (3, False), (2, True)):
        with mesh(path, num_servers) as built:
            if doubled:  # every expert on both servers
                for server in built.servers.values():
                    server.load([key for keys in split_copies(built.spec, 1) for key in keys])
                built.publish()
            async with RouterClient(built.router.address) as client:
                for layer in built.spec.layers:
                    block = reference_block(oracle, layer)
                    for num_tokens in (1, 7, 130):
                        x_TD = random_states(num_tokens, built.spec.dim, seed=num_tokens)
                        answer = await client.forward(layer, x_TD)
                        with torch.no_grad():
                            expected = block(x_TD.unsqueeze(0))[0]
                        assert relative_error(answer.y_TD, expected) <= TOLERANCE
                        assert_balanced(answer.ledger)
                        assert answer.ledger.pairs == num_tokens * built.spec.top_k


async def test_concurrent_requests_are_merged_and_each_gets_its_own_rows(model: Path) -> None:
    with mesh(model) as built:
        layer = built.spec.layers[0]
        local = LocalLayer(built.spec, layer)
        async with RouterClient(built.router.address) as client:
            states = [random_states(1 + seed % 5, built.spec.dim, seed) for seed in range(64)]
            answers = await asyncio.gather(*(client.forward(layer, x_TD) for x_TD in states))
        for x_TD, answer in zip(states, answers, strict=True):
            assert relative_error(answer.y_TD, local(x_TD)[0]) <= TOLERANCE
        assert max(answer.ledger.batch_tokens for answer in answers) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_sixteen_bit_states_come_back_in_their_dtype(model: Path, dtype: torch.dtype) -> None:
    with mesh(model) as built:
        layer = built.spec.layers[0]
        x_TD = random_states(9, built.spec.dim).to(dtype)
        async with RouterClient(built.router.address) as client:
            answer = await client.forward(layer, x_TD)
        assert answer.y_TD.dtype is dtype
        assert relative_error(answer.y_TD.float(), LocalLayer(built.spec, layer)(x_TD.float())[0]) < 2e-2


async def test_large_requests_travel_in_chunks(model: Path) -> None:
    with mesh(model, router=RouterConfig(chunk_bytes=4096)) as built:
        layer = built.spec.layers[0]
        x_TD = random_states(700, built.spec.dim)
        async with RouterClient(built.router.address) as client:
            answer = await client.forward(layer, x_TD)
        assert relative_error(answer.y_TD, LocalLayer(built.spec, layer)(x_TD)[0]) <= TOLERANCE


async def test_a_request_may_bring_its_own_routing(model: Path) -> None:
    with mesh(model) as built:
        layer = built.spec.layers[0]
        x_TD = random_states(6, built.spec.dim)
        rng = np.random.default_rng(0)
        routing = Routing(
            expert_TK=np.stack([rng.permutation(built.spec.num_experts)[:3] for _ in range(6)]).astype(np.int32),
            weight_TK=rng.random((6, 3), dtype=np.float32),
        )
        async with RouterClient(built.router.address) as client:
            answer = await client.forward(layer, x_TD, routing=routing, return_routing=True)
        assert relative_error(answer.y_TD, LocalLayer(built.spec, layer)(x_TD, routing)[0]) <= TOLERANCE
        assert answer.routing is not None
        np.testing.assert_array_equal(answer.routing.expert_TK, routing.expert_TK)


OVERFLOWS = {
    "wait": OverflowConfig(chain=("wait", "fail"), capacity_factor=0.5),
    "copy then wait": OverflowConfig(chain=("copy", "wait"), capacity_factor=0.5),
    "next expert": OverflowConfig(chain=("next_expert", "drop"), capacity_factor=1.0),
    "drop": OverflowConfig(chain=("drop",), capacity_factor=0.75),
    "drop and renormalize": OverflowConfig(chain=("drop",), capacity_factor=0.75, renormalize=True),
    "by position": OverflowConfig(chain=("next_expert", "wait"), capacity_factor=1.0, keep="position"),
    "at random": OverflowConfig(chain=("drop",), capacity_factor=1.0, keep="random"),
}


@pytest.mark.parametrize("name", OVERFLOWS)
async def test_every_overflow_policy_is_accounted_for_and_its_effective_routing_exact(name: str, model: Path) -> None:
    with mesh(model, router=RouterConfig(overflow=OVERFLOWS[name])) as built:
        layer = built.spec.layers[0]
        local = LocalLayer(built.spec, layer)
        x_TD = random_states(96, built.spec.dim) + 0.5 * random_states(1, built.spec.dim, seed=9)  # some skew
        async with RouterClient(built.router.address) as client:
            answer = await client.forward(layer, x_TD, return_routing=True)
        assert_balanced(answer.ledger)
        assert answer.routing is not None
        assert relative_error(answer.y_TD, local(x_TD, answer.routing)[0]) <= TOLERANCE
        chosen = local(x_TD)[1]
        moved = (answer.routing.expert_TK != chosen.expert_TK) & (answer.routing.expert_TK >= 0)
        assert answer.ledger.rerouted == moved.sum()
        assert answer.ledger.dropped == (answer.routing.expert_TK < 0).sum()
        lossy = answer.ledger.rerouted + answer.ledger.dropped
        assert (answer.ledger.waited > 0) if "wait" in name else (lossy > 0)
        if not lossy:
            assert relative_error(answer.y_TD, local(x_TD)[0]) <= TOLERANCE
        totals = built.router.report().totals
        assert (totals.rerouted, totals.dropped) == (answer.ledger.rerouted, answer.ledger.dropped)


async def test_a_full_expert_fails_only_the_requests_that_need_it(model: Path) -> None:
    policy = OverflowConfig(chain=("fail",), capacity_factor=0.01, min_capacity=4)
    with mesh(model, router=RouterConfig(overflow=policy)) as built:
        async with RouterClient(built.router.address) as client:
            with pytest.raises(Overloaded, match="capacity of 4 pairs per copy is full"):
                await client.forward(built.spec.layers[0], random_states(64, built.spec.dim))
            await client.forward(built.spec.layers[0], random_states(1, built.spec.dim))


async def test_a_request_overrides_the_overflow_policy(model: Path) -> None:
    with mesh(model) as built:
        x_TD = random_states(64, built.spec.dim)
        override = router_pb2.OverflowPolicy(chain=["drop"], capacity_factor=0.5)
        async with RouterClient(built.router.address) as client:
            lossy, plain = await asyncio.gather(
                client.forward(built.spec.layers[0], x_TD, overflow=override),
                client.forward(built.spec.layers[0], x_TD),
            )
            assert lossy.ledger.dropped > 0
            assert plain.ledger.dropped == 0
            with pytest.raises(InvalidRequest, match="chain"):
                await client.forward(built.spec.layers[0], x_TD, overflow=router_pb2.OverflowPolicy(chain=["guess"]))


async def test_servers_that_refuse_are_waited_for_and_nothing_is_lost(model: Path) -> None:
    config = ExpertServerConfig(max_queue_tokens=40, emulated_tokens_per_s=4000)
    with mesh(model, 2, experts=config) as built:
        layer = built.spec.layers[0]
        local = LocalLayer(built.spec, layer)
        states = [random_states(16, built.spec.dim, seed) for seed in range(12)]
        async with RouterClient(built.router.address) as client:
            answers = await asyncio.gather(*(client.forward(layer, x_TD) for x_TD in states))
        for x_TD, answer in zip(states, answers, strict=True):
            assert relative_error(answer.y_TD, local(x_TD)[0]) <= TOLERANCE
            assert_balanced(answer.ledger)


@pytest.mark.parametrize("renormalize", [False, True])
async def test_pairs_refused_by_servers_are_rerouted_or_dropped_exactly(model: Path, renormalize: bool) -> None:
    policy = OverflowConfig(chain=("copy", "next_expert", "drop"), renormalize=renormalize)
    experts = ExpertServerConfig(max_queue_tokens=60, emulated_tokens_per_s=300)  # still full when others are tried
    with mesh(model, 2, router=RouterConfig(overflow=policy, chunk_bytes=2048), experts=experts) as built:
        layer = built.spec.layers[0]
        local = LocalLayer(built.spec, layer)
        x_TD = random_states(100, built.spec.dim)
        async with RouterClient(built.router.address) as client:
            answer = await client.forward(layer, x_TD, return_routing=True)
        assert answer.ledger.dropped > 0
        assert_balanced(answer.ledger)
        assert answer.routing is not None
        assert relative_error(answer.y_TD, local(x_TD, answer.routing)[0]) <= TOLERANCE


@contextmanager
def server_process(model: Path, server_id: str, copies: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "experts", str(model), "--server-id", server_id, "--copies", copies],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process, json.loads(process.stdout.readline())["address"]
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class _Remote:
    """Stands in a Mesh for a server in another process."""

    def __init__(self, address: str) -> None:
        self.address = address


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_killed_or_hung_server_fails_no_request_when_another_copy_exists(
    model: Path, fault: signal.Signals
) -> None:
    with (
        server_process(model, "doomed", "all") as (process, address),
        mesh(model, 1, router=RouterConfig(hop_timeout_s=0.5)) as built,
    ):
        servers: dict[str, object] = {**built.servers, "doomed": _Remote(address)}
        keys = split_copies(built.spec, 1)[0]
        survivors, built.servers = built.servers, servers  # type: ignore[assignment]
        built.publish({key: list(servers) for key in keys})
        built.servers = survivors
        layer = built.spec.layers[0]
        local = LocalLayer(built.spec, layer)
        async with RouterClient(built.router.address) as client:

            async def load(worker: int) -> int:
                wrong = 0
                for step in range(40):
                    x_TD = random_states(8, built.spec.dim, seed=100 * worker + step)
                    answer = await client.forward(layer, x_TD, timeout_s=20)
                    wrong += relative_error(answer.y_TD, local(x_TD)[0]) > TOLERANCE
                    if worker == 0 and step == 10:
                        os.kill(process.pid, fault)
                return wrong

            wrong = sum(await asyncio.gather(*(load(worker) for worker in range(4))))
        assert wrong == 0
        totals = built.router.report().totals
        assert (totals.requests, totals.failed_requests) == (160, 0)
        assert [server_id for server_id, _ in built.lost] == ["doomed"]


async def test_rows_of_a_lost_sole_copy_wait_for_the_next_placement(model: Path) -> None:
    with server_process(model, "doomed", "all") as (process, address), mesh(model, {}) as built:
        built.servers = {"doomed": _Remote(address)}  # type: ignore[dict-item]
        keys = split_copies(built.spec, 1)[0]
        built.publish({key: ["doomed"] for key in keys})
        built.servers = {}
        layer = built.spec.layers[0]
        x_TD = random_states(8, built.spec.dim)
        async with RouterClient(built.router.address) as client:
            await client.forward(layer, x_TD)
            process.kill()
            process.wait()
            pending = asyncio.create_task(client.forward(layer, x_TD, timeout_s=20))
            while not built.lost:
                await asyncio.sleep(0.01)
            assert not pending.done()
            await asyncio.to_thread(built.add, "successor", keys)
            built.publish()
            answer = await pending
        assert relative_error(answer.y_TD, LocalLayer(built.spec, layer)(x_TD)[0]) <= TOLERANCE


async def test_an_expert_without_a_copy_follows_the_unavailability_policy(model: Path) -> None:
    with mesh(model, {}, router=RouterConfig(overflow=OverflowConfig(unavailable_chain=("fail",)))) as built:
        async with RouterClient(built.router.address) as client:
            with pytest.raises((NoCopy, Overloaded)):
                await client.forward(built.spec.layers[0], random_states(2, built.spec.dim))
    with mesh(model, {"s0": []}, router=RouterConfig(overflow=OverflowConfig(unavailable_chain=("drop",)))) as built:
        built.servers["s0"].load([(built.spec.layers[0], expert) for expert in range(4)])
        built.publish()
        async with RouterClient(built.router.address) as client:
            x_TD = random_states(40, built.spec.dim)
            answer = await client.forward(built.spec.layers[0], x_TD, return_routing=True)
        assert answer.routing is not None
        assert answer.ledger.dropped == (answer.routing.expert_TK < 0).sum() > 0
        local = LocalLayer(built.spec, built.spec.layers[0])
        assert relative_error(answer.y_TD, local(x_TD, answer.routing)[0]) <= TOLERANCE


async def test_a_stale_copy_is_replanned_not_failed(model: Path) -> None:
    with mesh(model, 2) as built:
        layer = built.spec.layers[0]
        first, second = built.servers.values()
        moved = [key for key in first.report().copies if key[0] == layer]
        second.load(moved)
        first.unload(moved)  # the table still names the first
        async with RouterClient(built.router.address) as client:
            x_TD = random_states(16, built.spec.dim)
            pending = asyncio.create_task(client.forward(layer, x_TD, timeout_s=20))
            done, _ = await asyncio.wait([pending], timeout=0.3)
            assert not done
            built.publish()
            answer = await pending
        assert answer.ledger.retried > 0
        assert relative_error(answer.y_TD, LocalLayer(built.spec, layer)(x_TD)[0]) <= TOLERANCE


async def test_a_deadline_ends_the_request_and_its_work(model: Path) -> None:
    with mesh(model, 1, experts=ExpertServerConfig(emulated_tokens_per_s=100)) as built:
        async with RouterClient(built.router.address) as client:
            layer = built.spec.layers[0]
            with pytest.raises(DeadlineExceeded, match="timeout_s"):
                await asyncio.gather(
                    *(client.forward(layer, random_states(8, built.spec.dim), timeout_s=0.05) for _ in range(20))
                )
        server = built.servers["s0"]
        async with asyncio.timeout(5):
            while server.report().queue_tokens:
                await asyncio.sleep(0.01)


async def test_a_vanished_client_leaves_no_work_behind(model: Path) -> None:
    with mesh(model, 1, experts=ExpertServerConfig(emulated_tokens_per_s=200)) as built:
        for _ in range(20):
            client = RouterClient(built.router.address)
            tasks = [
                asyncio.create_task(client.forward(built.spec.layers[0], random_states(8, built.spec.dim)))
                for _ in range(3)
            ]
            await asyncio.sleep(0.005)
            await client.close()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        server = built.servers["s0"]
        async with asyncio.timeout(10):
            while server.report().queue_tokens or built.router.report().queued_tokens:
                await asyncio.sleep(0.01)


BAD_REQUESTS: dict[str, tuple[Callable[[ModelSpec], tuple[str, Tensor]], str]] = {
    "no tokens": (lambda spec: ("layer", torch.empty(0, spec.dim)), "num_tokens is 0, limit is 1..max_request_tokens"),
    "too many tokens": (lambda spec: ("layer", torch.zeros(129, spec.dim)), r"num_tokens is 129.*\(128\)"),
    "wrong width": (lambda spec: ("layer", torch.zeros(2, spec.dim + 1)), "x has .* bytes"),
    "unknown layer": (lambda spec: ("99", torch.zeros(2, spec.dim)), "layer '99' is not a MoE layer"),
    "NaN": (lambda spec: ("layer", torch.full((2, spec.dim), torch.nan)), "x has a NaN or inf in row 0"),
    "inf": (lambda spec: ("layer", torch.full((2, spec.dim), torch.inf)), "x has a NaN or inf in row 0"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_requests_are_refused_with_field_value_and_limit(name: str, model: Path) -> None:
    make, message = BAD_REQUESTS[name]
    with mesh(model, 1, router=RouterConfig(max_request_tokens=128)) as built:
        layer, x_TD = make(built.spec)
        layer = built.spec.layers[0] if layer == "layer" else layer
        async with RouterClient(built.router.address) as client:
            with pytest.raises(InvalidRequest, match=message):
                await client.forward(layer, x_TD)
            await client.forward(built.spec.layers[0], random_states(3, built.spec.dim))  # the stream lives


@pytest.mark.parametrize(
    ("expert_ids", "message"),
    [([[0, 8]], r"expert_ids\[0, 1\] is 8 with weight 1.0, limit is 0..7"), ([[2, 2]], "each expert at most once")],
)
async def test_bad_routing_is_refused(expert_ids: list[list[int]], message: str, model: Path) -> None:
    with mesh(model, 1) as built:
        routing = Routing(expert_TK=np.array(expert_ids, dtype=np.int32), weight_TK=np.ones((1, 2), dtype=np.float32))
        async with RouterClient(built.router.address) as client:
            with pytest.raises(InvalidRequest, match=message):
                await client.forward(built.spec.layers[0], random_states(1, built.spec.dim), routing=routing)


async def test_large_finite_states_are_not_mistaken_for_infinite_ones(model: Path) -> None:
    with mesh(model, 1) as built:
        x_TD = torch.full((2, built.spec.dim), 3e38)
        async with RouterClient(built.router.address) as client:
            try:
                await client.forward(built.spec.layers[0], x_TD)
            except ExpertmeshError as err:
                assert not isinstance(err, InvalidRequest), err  # noqa: PT017


async def test_a_router_that_hangs_does_not_hang_its_client(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and says nothing
        async with RouterClient(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            with pytest.raises(DeadlineExceeded, match="did not answer"):
                await client.forward("0", torch.zeros(1, 8), timeout_s=0.05)


async def test_open_requests_count_against_the_router_until_they_are_answered(model: Path) -> None:
    config = RouterConfig(max_request_tokens=64, max_queued_tokens=64)
    with mesh(model, 1, router=config, experts=ExpertServerConfig(emulated_tokens_per_s=400)) as built:
        layer, x_TD = built.spec.layers[0], random_states(32, built.spec.dim)
        async with RouterClient(built.router.address) as client:
            outcomes = await asyncio.gather(*(client.forward(layer, x_TD) for _ in range(6)), return_exceptions=True)
            assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 4
            await client.forward(layer, x_TD)


async def test_a_hang_is_noticed_after_the_server_has_left_the_table(model: Path) -> None:
    with (
        server_process(model, "doomed", "all") as (process, address),
        mesh(model, 1, router=RouterConfig(hop_timeout_s=0.5)) as built,
    ):
        keys, survivors = split_copies(built.spec, 1)[0], built.servers
        built.servers = {"doomed": _Remote(address)}  # type: ignore[dict-item]
        built.publish({key: ["doomed"] for key in keys})
        layer, x_TD = built.spec.layers[0], random_states(4, built.spec.dim)
        async with RouterClient(built.router.address) as client:
            await client.forward(layer, x_TD)
            os.kill(process.pid, signal.SIGSTOP)
            pending = asyncio.create_task(client.forward(layer, x_TD, timeout_s=20))
            while built.router.report().queued_tokens == 0:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)  # the rows are on their way
            built.servers = survivors
            built.publish()
            answer = await asyncio.wait_for(pending, 5)
        assert relative_error(answer.y_TD, LocalLayer(built.spec, layer)(x_TD)[0]) <= TOLERANCE


async def test_a_stopping_router_refuses_at_once_and_reports_not_serving(model: Path) -> None:
    with mesh(model, 1, experts=ExpertServerConfig(emulated_tokens_per_s=40)) as built:
        async with RouterClient(built.router.address) as client, grpc.aio.insecure_channel(built.router.address) as raw:
            health = health_pb2_grpc.HealthStub(raw)
            check = health_pb2.HealthCheckRequest(service=ROUTER_SERVICE)
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
            layer = built.spec.layers[0]
            pending = asyncio.create_task(client.forward(layer, random_states(8, built.spec.dim)))
            while built.router.report().queued_tokens == 0:
                await asyncio.sleep(0.005)
            stopping = asyncio.create_task(asyncio.to_thread(built.router.stop, 5.0))
            while (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.005)
            with pytest.raises(Draining):
                await client.forward(layer, random_states(8, built.spec.dim))
            await pending
            await stopping
