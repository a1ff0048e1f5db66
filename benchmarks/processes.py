"""The other processes of the data path benchmark: bare echo, compute without transport, our servers, Ray's ways.

Each child is this module run with a role; it prints one JSON line when ready and ends when its standard input closes.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch
import uvloop
from safetensors.torch import save_file

from experts.compute import partial_sums
from experts.weights import load_expert
from protos.checkpoint import Checkpoint, read_model
from protos.loops import keep_freed_memory
from protos.services import CHANNEL_OPTIONS

ROOT = Path(__file__).parent.parent


def make_model(path: Path, *, dim: int, hidden_dim: int, num_experts: int, top_k: int, layers: int = 1) -> Path:
    """A random Mixtral checkpoint of the given shape, fp32."""
    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.randn(num_experts, dim, generator=rng) / dim**0.5
        for expert in range(num_experts):
            for name, shape in (("w1", (hidden_dim, dim)), ("w3", (hidden_dim, dim)), ("w2", (dim, hidden_dim))):
                weight = torch.randn(*shape, generator=rng) / shape[1] ** 0.5
                tensors[f"{block}.experts.{expert}.{name}.weight"] = weight
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@contextmanager
def child(*command: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A child process and the JSON line it printed when ready; its input is closed at the end."""
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield process, json.loads(line)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class ComputeOnly:
    """Two processes that hold the experts of the two servers and compute without any transport.

    `series(dispatches)` lets both run the same calls at the same time, and returns seconds [calls] per process.
    """

    def __init__(self, stack: ExitStack, model: Path, experts: list[list[int]]) -> None:
        self._processes = [
            stack.enter_context(child("-m", "benchmarks.processes", "compute", str(model), json.dumps(held)))[0]
            for held in experts
        ]

    def series(self, calls: list[list[dict[str, Any] | None]], *, repeat: int) -> list[list[float]]:
        """calls[i][p]: what process p computes of call i (None: nothing). Repeats the whole series."""
        for process, mine in zip(self._processes, zip(*calls, strict=True), strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps({"calls": mine, "repeat": repeat}) + "\n")
            process.stdin.flush()
        replies = []
        for process in self._processes:
            assert process.stdout is not None
            replies.append(json.loads(process.stdout.readline()))
        return replies


def compute_main(model: Path, experts: list[int]) -> None:
    """Time `partial_sums` on request: what the expert server runs, with nothing around it."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the expert servers do
    spec = read_model(model)
    checkpoint = Checkpoint(spec)
    cpu, fp32 = torch.device("cpu"), torch.float32
    copies = {expert: load_expert(checkpoint, spec.layers[0], expert, device=cpu, dtype=fp32) for expert in experts}
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prepared = [
            call
            and (
                torch.randn(call["rows"], spec.dim),
                np.array(call["pair_row"], dtype=np.int32),
                np.array(call["pair_expert"], dtype=np.int32),
                np.array(call["pair_weight"], dtype=np.float32),
            )
            for call in job["calls"]
        ]
        seconds = []
        for _ in range(job["repeat"]):
            for call in prepared:
                start = time.perf_counter()
                if call:
                    partial_sums(*call, copies)
                seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


async def echo_main() -> None:
    """A bare bidirectional stream that returns every message: the floor of any gRPC data path in Python."""

    async def echo(_: object, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class Echo:
    """Streams to echo servers; `call` sends one list of messages per server and waits for all of them to return."""

    def __init__(self, addresses: list[str]) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        self._streams = [channel.stream_stream("/Echo/Echo")() for channel in self._channels]

    async def call(self, messages: list[list[bytes]]) -> None:
        async def one(stream: grpc.aio.StreamStreamCall, mine: list[bytes]) -> None:
            async def write() -> None:
                for message in mine:
                    await stream.write(message)

            if len(mine) == 1:
                await stream.write(mine[0])
                await stream.read()
                return
            writer = asyncio.create_task(write())
            for _ in mine:
                await stream.read()
            await writer

        busy = [(stream, mine) for stream, mine in zip(self._streams, messages, strict=True) if mine]
        if len(busy) == 1:
            await one(*busy[0])
        else:
            await asyncio.gather(*(one(stream, mine) for stream, mine in busy))

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        uvloop.run(echo_main())
    else:
        compute_main(Path(sys.argv[2]), json.loads(sys.argv[3]))
