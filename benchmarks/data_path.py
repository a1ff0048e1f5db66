"""The data path against its floor, and against what a Ray user would write first.

    python -m benchmarks.data_path [--rounds N] [--out FILE]

One router (this process) and two expert servers (two processes), D=512, F=1024, E=8, top-2, fp32, half of the experts
on each server. All arms take turns within every round, on the same calls:

    echo       bare bidirectional gRPC streams to two processes, same messages, nothing computed
    compute    the two servers' computation in two processes at the same time, nothing sent
    mesh       expertmesh: router -> servers -> router
    endpoint   expertmesh through its public endpoint: client -> router process -> servers and back (one hop more)
    actors     plain Ray actors with the same weights and the same kernel, called with the gathered rows
    serve      the same behind Ray Serve deployment handles

The floor of a call is median(echo) + median(slower of the two computations). Ratios of medians of one run are what
counts; absolute times on a shared two-core machine move by a factor of two.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import uvloop
from torch import Tensor

from benchmarks.document import publish
from benchmarks.processes import ComputeOnly, Echo, child, make_model
from protos import common_pb2, expert_pb2
from protos.checkpoint import Checkpoint, read_model
from protos.codec import encode, tensor_bytes
from protos.model import ModelSpec
from router.__main__ import fixed_table
from router.client import RouterClient
from router.config import RouterConfig
from router.core import Router
from router.dispatch import Dispatch, plan_dispatch, split_rows
from router.gate import Gate

DIM, HIDDEN_DIM, NUM_EXPERTS, TOP_K = 512, 1024, 8, 2
SIZES = {1: 60, 16: 30, 2048: 3}  # tokens per call -> calls per round and arm
EXPERTS = [[0, 1, 2, 3], [4, 5, 6, 7]]

Call = Callable[[int], Awaitable[Any]]


def dispatches(spec: ModelSpec, gate: Gate, x_TD: Tensor, table: Any) -> list[list[Dispatch]]:
    """Per server, the row blocks the router sends for this call."""
    routing = gate(x_TD)
    plan = plan_dispatch(
        routing.expert_TK,
        routing.weight_TK,
        table.layer(spec.layers[0]),
        load_S=np.zeros(2),
        rng=np.random.default_rng(0),
    )
    blocks: list[list[Dispatch]] = [[], []]
    for dispatch in plan.dispatches:
        blocks[dispatch.server] = split_rows(dispatch, RouterConfig().chunk_bytes // (4 * spec.dim))
    return blocks


def message(spec: ModelSpec, x_TD: Tensor, block: Dispatch) -> bytes:
    """The ComputeRequest of a block, as the router encodes it."""
    head = expert_pb2.ComputeRequest(
        call_id=1,
        layer=spec.layers[0],
        epoch=1,
        num_rows=len(block.row_R),
        dtype=common_pb2.DTYPE_FLOAT32,
        partial_dtype=common_pb2.DTYPE_FLOAT32,
        timeout_s=30,
        pair_row=block.pair_row_P.tobytes(),
        pair_expert=block.pair_expert_P.tobytes(),
        pair_weight=block.pair_weight_P.tobytes(),
    )
    return encode(head, tensor_bytes(x_TD[torch.from_numpy(block.row_R)]))


def compute_job(blocks: list[Dispatch]) -> dict[str, Any] | None:
    """One server's part of a call as one computation (the server merges the blocks of a call)."""
    if not blocks:
        return None
    offsets = np.cumsum([0, *(len(block.row_R) for block in blocks)])
    return {
        "rows": int(offsets[-1]),
        "pair_row": np.concatenate([b.pair_row_P + o for b, o in zip(blocks, offsets, strict=False)]).tolist(),
        "pair_expert": np.concatenate([b.pair_expert_P for b in blocks]).tolist(),
        "pair_weight": np.concatenate([b.pair_weight_P for b in blocks]).tolist(),
    }


def on_ray(call: Callable[[Gate, Tensor], Awaitable[Tensor]], gate: Gate, inputs: list[Tensor]) -> Call:
    """A Ray arm on one list of inputs."""
    return lambda i: call(gate, inputs[i % len(inputs)])


async def timed(call: Call, count: int) -> list[float]:
    """Seconds of `count` calls, one after another; call i uses input i modulo the number of inputs."""
    seconds = []
    for i in range(count):
        start = time.perf_counter()
        await call(i)
        seconds.append(time.perf_counter() - start)
    return seconds


async def clients(call: Call, *, concurrency: int, calls: int) -> float:
    """Seconds for `concurrency` clients of `calls` calls each."""

    async def client(worker: int) -> None:
        for i in range(calls):
            await call(worker * calls + i)

    start = time.perf_counter()
    await asyncio.gather(*(client(worker) for worker in range(concurrency)))
    return time.perf_counter() - start


async def run(rounds: int, with_ray: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_model(folder / "m", dim=DIM, hidden_dim=HIDDEN_DIM, num_experts=NUM_EXPERTS, top_k=TOP_K)
        spec = read_model(model)
        gate = Gate(spec.blocks[spec.layers[0]].gate, Checkpoint(spec).gate(spec.layers[0]))
        servers = [
            stack.enter_context(
                child("-m", "experts", str(model), "--copies", f"*:{held[0]}-{held[-1]}", "--server-id", f"s{i}",
                      "--config", '{"compute_threads": 1}')
            )[1]["address"]
            for i, held in enumerate(EXPERTS)
        ]  # fmt: skip
        flags = [flag for address in servers for flag in ("--server", address)]
        router_config = '{"compute_threads": 1}'
        endpoint = stack.enter_context(child("-m", "router", str(model), *flags, "--config", router_config))[1]
        echoes = [stack.enter_context(child("-m", "benchmarks.processes", "echo"))[1]["address"] for _ in EXPERTS]
        compute = ComputeOnly(stack, model, EXPERTS)
        table = fixed_table(servers, num_experts=NUM_EXPERTS)
        router = Router(spec, RouterConfig(compute_threads=1))
        await router.start()
        router.adopt(table)
        echo, client = Echo(echoes), RouterClient(endpoint["address"])
        ray_calls = {}
        if with_ray:
            from benchmarks.ray_arms import start_ray_arms

            ray_calls = start_ray_arms(stack, model, EXPERTS, table)

        rng = torch.Generator().manual_seed(1)
        inputs = {size: [torch.randn(size, DIM, generator=rng) for _ in range(16)] for size in SIZES}
        blocks = {size: [dispatches(spec, gate, x_TD, table) for x_TD in inputs[size]] for size in SIZES}
        messages = {
            size: [
                [[message(spec, x_TD, block) for block in mine] for mine in per_server]
                for x_TD, per_server in zip(inputs[size], blocks[size], strict=True)
            ]
            for size in SIZES
        }
        jobs = {size: [[compute_job(mine) for mine in per_server] for per_server in blocks[size]] for size in SIZES}

        def arms(size: int) -> dict[str, Call]:
            layer = spec.layers[0]
            return {
                "echo": lambda i: echo.call(messages[size][i % 16]),
                "mesh": lambda i: router.forward(layer, inputs[size][i % 16]),
                "endpoint": lambda i: client.forward(layer, inputs[size][i % 16]),
                **{name: on_ray(call, gate, inputs[size]) for name, call in ray_calls.items()},
            }

        seconds: dict[int, dict[str, list[float]]] = {size: {} for size in SIZES}
        for size in SIZES:
            for call in arms(size).values():
                await timed(call, 16)  # warm up: connections, allocators, learnt launch costs
            compute.series(jobs[size], repeat=1)
        merged: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        process = psutil.Process()
        for _ in range(rounds):
            for size, count in SIZES.items():
                for name, call in arms(size).items():
                    seconds[size].setdefault(name, []).extend(await timed(call, count))
                both = compute.series((jobs[size] * (count // 16 + 1))[:count], repeat=1)
                slower = [max(pair) for pair in zip(*both, strict=True)]
                seconds[size].setdefault("compute", []).extend(slower)
                # Throughput without transport: each process works through its share at its own pace.
                seconds[size].setdefault("compute_rate", []).append(max(map(sum, both)) / count)
            pipelined = await clients(arms(2048)["mesh"], concurrency=4, calls=2)
            merged.setdefault("2048 x 4 clients", []).append(8 * 2048 / pipelined)
            for concurrency in (16, 64):
                took = await clients(arms(16)["mesh"], concurrency=concurrency, calls=640 // concurrency)
                merged.setdefault(f"16 x {concurrency} clients", []).append(
                    640 // concurrency * concurrency * 16 / took
                )
                memory[f"router RSS MB after {concurrency} clients"] = process.memory_info().rss / 1e6
        await client.close()
        await echo.close()
        await router.close()
    return summary(seconds, merged, memory)


def summary(
    seconds: dict[int, dict[str, list[float]]], merged: dict[str, list[float]], memory: dict[str, float]
) -> dict[str, Any]:
    """Medians, ratios to the floor, and whether the targets are met."""
    p50 = {size: {name: statistics.median(values) for name, values in arms.items()} for size, arms in seconds.items()}
    rates = {name: statistics.median(values) for name, values in merged.items()}
    floor = {size: p50[size]["echo"] + p50[size]["compute"] for size in p50}
    alone = {size: size / p50[size]["compute_rate"] for size in p50}
    ratios = {
        "1 token: mesh / (echo + compute), target <= 1.6": p50[1]["mesh"] / floor[1],
        "16 tokens: mesh / (echo + compute), target <= 1.4": p50[16]["mesh"] / floor[16],
        "2048 tokens: throughput / compute alone, one call at a time": 2048 / p50[2048]["mesh"] / alone[2048],
        "2048 tokens: throughput / compute alone, 4 calls in flight, target >= 0.85": rates["2048 x 4 clients"]
        / alone[2048],
        "16 clients of 16 tokens: throughput / compute alone unmerged, target >= 1.5": rates["16 x 16 clients"]
        / alone[16],
        "64 clients / 16 clients of 16 tokens, target >= 1": rates["16 x 64 clients"] / rates["16 x 16 clients"],
        "1 token: endpoint / mesh (the client's own hop)": p50[1]["endpoint"] / p50[1]["mesh"],
    }
    for name, target in (("serve", 4), ("actors", 2)):
        if name in p50[1]:
            ratios[f"1 token: {name} / mesh, target >= {target}"] = p50[1][name] / p50[1]["mesh"]
            ratios[f"16 tokens: {name} / mesh"] = p50[16][name] / p50[16]["mesh"]
            ratios[f"2048 tokens: {name} / mesh"] = p50[2048][name] / p50[2048]["mesh"]
    return {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "p50_ms": {
            str(size): {name: round(value * 1e3, 3) for name, value in arms.items()} for size, arms in p50.items()
        },
        "tokens_per_s": {name: round(value) for name, value in rates.items()}
        | {f"{size} compute alone": round(value) for size, value in alone.items()},
        "memory_mb": {name: round(value) for name, value in memory.items()},
        "shape": {"D": DIM, "F": HIDDEN_DIM, "E": NUM_EXPERTS, "K": TOP_K, "dtype": "float32"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-ray", action="store_true", help="leave out the Ray arms")
    args = parser.parse_args()
    result = uvloop.run(run(args.rounds, with_ray=not args.no_ray))
    publish(result, packages=("grpcio", "protobuf", "ray", "torch", "numpy"), out=args.out)


if __name__ == "__main__":
    main()
