"""What loading costs those who wait for answers: latency of a server's requests while it loads, against the same server
at rest in the same run.

    python -m benchmarks.loading_p99 [--rounds N] [--window-s S] [--rate R] [--weight-dtype W] [--out FILE]

Two expert servers, a process each. Requests of 8 rows arrive at one of them at a fixed rate (open loop: a late answer
delays no later request). In turns, every round:

    quiet         nothing is loaded
    page_cache    it loads and unloads four experts over and over, from the node's page cache
    storage       the same, evicted from the page cache before each load
    peer          the same, evicted, with the other server as a source
    gives         the other server fetches from this one
    plain thread  from the page cache on an ordinary thread: what loading would be without its own
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch
import uvloop

from benchmarks.document import publish
from benchmarks.processes import ROOT, child, make_model
from experts.config import ExpertServerConfig
from experts.service import ExpertServer
from protos import common_pb2, expert_pb2
from protos.checkpoint import read_model
from protos.codec import encode, tensor_bytes
from protos.loops import freeze_garbage_collector
from protos.services import CHANNEL_OPTIONS, compute_stream

DIM, HIDDEN_DIM, NUM_EXPERTS = 1024, 1408, 8
SERVING, MOVING = range(4), range(4, 8)
ROWS, TOP_K = 8, 2
ARMS = ("quiet", "page_cache", "storage", "peer", "gives", "plain thread")


# ---------------------------------------------------------------------- a server that loads on command


def serve(model: Path, config: str, held: Sequence[int]) -> None:
    """Serve; then one command a line on standard input: {"arm", "peer"} starts loading, {} ends it and reports."""
    torch.set_num_threads(1)
    spec = read_model(model)
    layer = spec.layers[0]
    server = ExpertServer(spec, ExpertServerConfig.model_validate_json(config), server_id=f"server-{os.getpid()}")
    server.load([(layer, expert) for expert in held])
    freeze_garbage_collector()
    print(json.dumps({"address": server.start("127.0.0.1"), "copy_bytes": server.copy_bytes}), flush=True)
    with ThreadPoolExecutor(1) as worker:
        for line in sys.stdin:
            job, done = json.loads(line), threading.Event()
            keys = [(layer, expert) for expert in (SERVING if job["arm"] == "gives" else MOVING)]
            loading = worker.submit(_load_until, done, _loads(server, model, keys, job), server)
            sys.stdin.readline()
            done.set()
            print(json.dumps(loading.result()), flush=True)
    server.stop(1.0)


def _loads(server: ExpertServer, model: Path, keys: list[tuple[str, int]], job: dict[str, str]) -> Callable[[], None]:
    sources = {key: [job["peer"]] for key in keys} if job["arm"] in ("peer", "gives") else {}

    def load() -> None:
        if job["arm"] == "plain thread":
            server._shard.load(keys)
        else:
            if job["arm"] != "page_cache":
                _evict(model / "model.safetensors")
            server.load(keys, sources)
        server.unload(keys)

    return load


def _load_until(done: threading.Event, load: Callable[[], None], server: ExpertServer) -> dict[str, float]:
    """Copies and seconds, and the copies that came from each source."""
    num, start_s, before = 0, time.monotonic(), server.report().loaded
    while not done.is_set():
        load()
        num += len(MOVING)
    after = server.report().loaded
    sources = {f"from {name}": after[name].copies - before[name].copies for name in after}
    return {"copies": num, "seconds": time.monotonic() - start_s, **sources}


def _evict(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)  # what is not written yet stays
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- the requests


async def latencies(
    stream: grpc.aio.StreamStreamCall, message: Callable[[int], bytes], rate: float, seconds: float
) -> list[float]:
    """Seconds from when each request was due until its answer."""
    due_s: dict[int, float] = {}
    took_s: list[float] = []
    num, start_s = int(rate * seconds), time.monotonic()

    async def write() -> None:
        for number in range(num):
            due_s[number + 1] = start_s + number / rate
            await asyncio.sleep(max(0.0, due_s[number + 1] - time.monotonic()))
            await stream.write(message(number + 1))

    writing = asyncio.create_task(write())
    while len(took_s) < num:
        answer = expert_pb2.ComputeResponse.FromString(await stream.read())
        if answer.call_id:  # else a pulse
            assert not answer.HasField("error"), answer.error
            took_s.append(time.monotonic() - due_s[answer.call_id])
    await writing
    return took_s


def message(layer: str) -> Callable[[int], bytes]:
    """Requests by call id: random rows, every row to two of the experts that stay."""
    rng = np.random.default_rng(0)
    expert_P = np.concatenate([rng.permutation(len(SERVING))[:TOP_K] for _ in range(ROWS)]).astype(np.int32)
    payload = tensor_bytes(torch.randn(ROWS, DIM))

    def make(call_id: int) -> bytes:
        head = expert_pb2.ComputeRequest(
            call_id=call_id,
            layer=layer,
            num_rows=ROWS,
            dtype=common_pb2.DTYPE_FLOAT32,
            partial_dtype=common_pb2.DTYPE_FLOAT32,
            pair_row=np.repeat(np.arange(ROWS, dtype=np.int32), TOP_K).tobytes(),
            pair_expert=expert_P.tobytes(),
            pair_weight=np.full(ROWS * TOP_K, 0.5, dtype=np.float32).tobytes(),
        )
        return encode(head, payload)

    return make


async def run(arms: Sequence[str], rounds: int, window_s: float, rate: float, weight_dtype: str) -> dict[str, Any]:
    settings = json.dumps({"compute_threads": 1, "compute_dtype": "float32", "weight_dtype": weight_dtype})
    took_s: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    loaded: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT)))  # a disk: /tmp may be memory
        model = make_model(path, dim=DIM, hidden_dim=HIDDEN_DIM, num_experts=NUM_EXPERTS, top_k=TOP_K)
        layer = read_model(model).layers[0]

        def server(held: range) -> tuple[subprocess.Popen[str], dict[str, Any]]:
            command = ("-m", "benchmarks.loading_p99", "--serve", str(model), settings, json.dumps(list(held)))
            return stack.enter_context(child(*command))

        tested, peer = server(SERVING), server(range(NUM_EXPERTS))
        other = server(range(0))
        async with grpc.aio.insecure_channel(tested[1]["address"], options=CHANNEL_OPTIONS) as channel:
            stream, make = compute_stream(channel), message(layer)
            await latencies(stream, make, rate, 2.0)  # warm up
            freeze_garbage_collector()
            for _ in range(rounds):
                for arm in arms:
                    loading, source = (other[0], tested) if arm == "gives" else (tested[0], peer)
                    if arm != "quiet":
                        tell(loading, {"arm": arm, "peer": source[1]["address"]})
                    took_s[arm].append(await latencies(stream, make, rate, window_s))
                    if arm != "quiet":
                        tell(loading, {})
                        assert loading.stdout is not None
                        loaded[arm].append(json.loads(loading.stdout.readline()))
            stream.cancel()
        copy_bytes = tested[1]["copy_bytes"]
    return {
        "arms": {arm: summary(arm, took_s, loaded[arm], copy_bytes) for arm in arms},
        "shape": {"D": DIM, "F": HIDDEN_DIM, "rows": ROWS, "K": TOP_K, "copy_bytes": copy_bytes},
    }


def tell(process: "subprocess.Popen[str]", command: dict[str, str]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()


def summary(
    arm: str, took_s: dict[str, list[list[float]]], loaded: list[dict[str, float]], copy_bytes: int
) -> dict[str, float]:
    """Latencies of all rounds together, and the median over rounds of the ratio to that round's quiet window."""
    pooled = [seconds for window in took_s[arm] for seconds in window]
    found = {f"p{percent}_ms": round(float(np.percentile(pooled, percent)) * 1e3, 2) for percent in (50, 90, 99)}
    for percent in (50, 99):
        ratios = [
            np.percentile(mine, percent) / np.percentile(quiet, percent)
            for mine, quiet in zip(took_s[arm], took_s["quiet"], strict=True)
        ]
        found[f"p{percent} / quiet"] = round(float(statistics.median(ratios)), 3)
    if loaded:
        rate = sum(load["copies"] for load in loaded) * copy_bytes / sum(load["seconds"] for load in loaded)
        found["loaded_MB_per_s"] = round(rate / 1e6, 1)
        for name in sorted({name for load in loaded for name in load if name.startswith("from ")}):
            found[name] = sum(load[name] for load in loaded)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--window-s", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second")
    parser.add_argument("--weight-dtype", default="compute", choices=("compute", "int8", "int4", "fp8"))
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=ARMS[1:], help="beside quiet")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = uvloop.run(run(("quiet", *args.arms), args.rounds, args.window_s, args.rate, args.weight_dtype))
    publish(result, packages=("grpcio", "torch", "numpy"), out=args.out)


if __name__ == "__main__":
    main()
