"""What `expertmesh demo` does around its story: record the traffic, start Ray, deploy, show, sum up, clean up."""

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from cluster.arrays import writable
from cluster.bring_up import bring_up
from cluster.demo import Demo
from cluster.demo_settings import Settings, cluster_config, demo_files
from cluster.demo_view import DemoView
from cluster.local import NodeScaling, connect, local_ray
from cluster.picture import draw
from cluster.recording import record_states
from protos.checkpoint import read_model
from protos.errors import InvalidRequest
from protos.loops import freeze_garbage_collector

RECORDED_TOKENS = 4096  # of each text
READY_TIMEOUT_S = 180.0


def run_demo(settings: Settings, root: Path, *, json_file: Path | None, picture: Path, console: Console) -> bool:
    """The guided run; True if no promise was broken.

    Args:
        root: of the repository, where examples/ is.
        json_file: gets the summary as a JSON document.
        picture: gets the picture (PNG).

    Raises:
        InvalidRequest: examples/ is not there, or a file cannot be written.
        Unavailable: Ray or the cluster did not start.
    """
    for file in filter(None, (json_file, picture)):
        writable(file)
    model, texts = demo_files(root)
    if not model.is_dir():
        raise InvalidRequest(f"{model}: no such directory (the demo runs in a checkout of the repository)")
    torch.set_num_threads(1)  # the cores belong to the servers
    spec = read_model(model)
    emulation = (
        f"EMULATION: each server is paced like a device of {settings.emulated_pairs_per_s:,.0f} routed pairs/s; "
        "nodes and GPUs are fake"
    )
    view = DemoView(console, emulation=emulation, hot={})
    view.say(f"reading {' and '.join(texts)} with the demo model, to record its hidden states")
    states = record_states(spec, texts, max_tokens=RECORDED_TOKENS)
    nodes = NodeScaling(
        min_nodes=settings.min_servers + settings.spare_nodes, max_nodes=settings.max_servers, idle_s=3.0
    )
    config = cluster_config(settings, spec)
    view.say("starting a Ray cluster whose autoscaler adds and removes (fake) GPU nodes")
    with _uninterrupted_at_the_end(), local_ray(num_cpus=2, nodes=nodes) as local:
        try:
            connect(local.address)
            view.say(f"deploying {settings.min_servers} expert servers")
            found = bring_up(config, timeout_s=READY_TIMEOUT_S, on_progress=view.say)
            demo = Demo(settings, spec, states, router=found["router"]["grpc"])
            view = DemoView(console, emulation=emulation, hot=demo.hot)
            freeze_garbage_collector()
            with view.live() as show:
                asyncio.run(demo.run(lambda frame: show(demo.timeline, frame)))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            view.say("stopping everything that was started")
            ray.shutdown()
    draw(demo.timeline, picture, hot=demo.hot, subtitle=emulation)
    view.summary(demo.timeline, demo.verdicts, picture)
    if json_file is not None:
        json_file.write_text(json.dumps(_document(demo, settings, emulation), allow_nan=False) + "\n")
    return all(verdict.outcome != "FAILED" for verdict in demo.verdicts)


def _document(demo: Demo, settings: Settings, emulation: str) -> dict[str, Any]:
    return {
        "ok": all(verdict.outcome != "FAILED" for verdict in demo.verdicts),
        "emulation": emulation,
        "settings": asdict(settings),
        "hottest": {domain: list(key) for domain, key in demo.hot.items()},
        "measured": asdict(demo.measured),
        "verdicts": [asdict(verdict) for verdict in demo.verdicts],
        "timeline": demo.timeline.to_json(),
    }


@contextmanager
def _uninterrupted_at_the_end() -> Iterator[None]:
    """Cleaning up ignores further Ctrl-C (see the `finally` above); afterwards it works as before."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
