"""A Ray of our own on this machine, for `expertmesh up`, the demo and tests, or one that runs elsewhere.

Everything we start lives in one POSIX session (`setsid`), which Ray's workers, although each has a process group of
its own, never leave. So stopping means: signal the members of that session, by pid, and nobody else. `ray stop`, which
ends every Ray on the machine, is never used. Temp dir and ports are our own, so that other Rays are not met.

With node scaling, Ray's own autoscaler (v2) runs against its fake multi-node provider: worker nodes are raylets on
this machine. `ray.cluster_utils.AutoscalingCluster` does the same, but its example.yaml is missing from the wheel and
it runs `ray stop --force`.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import ray
from ray._private import ray_constants, ray_logging

from protos.errors import InvalidRequest, Unavailable

START_TIMEOUT_S = 90.0
STOP_GRACE_S = 5.0
_OBJECT_STORE_BYTES = 100 << 20  # nothing of ours goes through the object store
_FAKE_HEAD_ID = "f" * 51 + "00000"  # what the fake provider calls its head node
# Importing torch is most of a replica's start: workers that Ray keeps in reserve have it already.
_PRELOAD = "torch,ray.serve._private.replica,cluster.expert_replica"


_children: dict[int, "subprocess.Popen[bytes]"] = {}  # by session, to be waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeScaling:
    """Worker nodes that Ray's autoscaler adds and removes, with fake GPUs."""

    min_nodes: int
    max_nodes: int
    cpus_per_node: int = 1
    gpus_per_node: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)  # custom ones, of one node
    idle_s: float = 5.0  # a node without work goes after this long


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """A Ray that `start_ray` started. Plain values: another process may stop it."""

    address: str  # host:port of its GCS
    session: int  # POSIX session of all its processes
    temp_dir: Path

    def pids(self) -> list[int]:
        """Its processes, [] if they are gone (and their session id belongs to somebody else)."""
        members = [process for process in psutil.process_iter() if _session_of(process.pid) == self.session]
        if not any(str(self.temp_dir) in " ".join(_command_of(process)) for process in members):
            return []
        return [process.pid for process in members]

    def stop(self) -> None:
        """End exactly its processes, politely first, and remove its files. Idempotent."""
        pids = self.pids()
        if pids:
            if self.session in pids:
                _signal([self.session], signal.SIGTERM)  # `ray start --block` ends its children in order
            _gone(lambda: not self.pids(), STOP_GRACE_S)
            left = self.pids() or [pid for pid in pids if _session_of(pid) == self.session]
            while left:
                _signal(left, signal.SIGKILL)
                time.sleep(0.05)
                left = [pid for pid in left if _session_of(pid) == self.session]
        if self.session in _children:
            _children.pop(self.session).wait()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def start_ray(
    *,
    num_cpus: int,
    num_gpus: int = 0,
    resources: Mapping[str, float] = MappingProxyType({}),
    nodes: NodeScaling | None = None,
) -> LocalRay:
    """Start a head node on this machine.

    Args:
        num_cpus, num_gpus, resources: what the head node says it has; GPUs need not exist.
        nodes: worker nodes by demand; None for the head alone.

    Raises:
        Unavailable: Ray did not start; the message has its last lines.
    """
    temp_dir = Path(tempfile.mkdtemp(prefix="expertmesh-", dir="/tmp"))  # short: Unix sockets live below it
    host, port = "127.0.0.1", _free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
        f"--node-ip-address={host}",
        *(f"--temp-dir={temp_dir}", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"),
        f"--resources={json.dumps(dict(resources))}",
        *("--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={_free_port()}"),
    ]
    if nodes is not None:
        config_file = temp_dir / "autoscaler.json"
        config_file.write_text(json.dumps(_autoscaler_config(f"{host}:{port}", num_cpus, num_gpus, nodes)))
        command.append(f"--autoscaling-config={config_file}")
    log_file = temp_dir / "start.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(os.environ, autoscaling=nodes is not None),
        )
    _children[process.pid] = process
    started = LocalRay(address=f"{host}:{port}", session=process.pid, temp_dir=temp_dir)
    try:
        _wait_until_up(process, log_file)
    except BaseException:
        started.stop()
        raise
    return started


@contextmanager
def local_ray(*, num_cpus: int, num_gpus: int = 0, nodes: NodeScaling | None = None) -> Iterator[LocalRay]:
    """`start_ray`, stopped at the end whatever happens."""
    started = start_ray(num_cpus=num_cpus, num_gpus=num_gpus, nodes=nodes)
    try:
        yield started
    finally:
        started.stop()


def connect(address: str) -> None:
    """Make this process a driver of the Ray at `address` (host:port, or "auto" for the one on this machine).

    Raises:
        Unavailable: nothing answers there.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # ray.init would otherwise invent a token of its own
    logging.getLogger("ray").setLevel(logging.WARNING)
    # Ray prints what its raylets complain about ("A worker died ...") on our standard output, whatever log_to_driver
    # says; that stream belongs to the caller, and the status has it as an event.
    ray_logging.stdout_deduplicator.skip_re = re.compile("")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"address is {address!r}, expected host:port or auto")
        if host.startswith("127."):
            ray_constants.ENABLE_RAY_CLUSTER = False  # or Ray would look for it on another interface of this machine
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as err:  # ray.init would retry for minutes
            raise Unavailable(f"no Ray at {address}: {err.strerror or err}") from err
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise Unavailable(f"no Ray at {address}: {str(err).splitlines()[0]}") from err


def _environment(inherited: Mapping[str, str], *, autoscaling: bool) -> dict[str, str]:
    environment = {name: value for name, value in inherited.items() if name != "RAY_ADDRESS"}
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # All nodes on the loopback interface, those of the fake provider too: nothing listens to the network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_preload_python_modules": _PRELOAD,
        "RAY_enable_worker_prestart": "1",  # for the first replica of a node; cluster/spare.py sees to the next
        # Workers import our packages from where this process has them, installed or not.
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent.parent), *filter(None, [inherited.get("PYTHONPATH")])]
        ),
        # Every process would otherwise start a thread pool as wide as the machine.
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1"),
        # Ray's default of 15 lets a node that starts, or anything else on the machine, starve the servers.
        "RAY_worker_niceness": "0",
    }
    if autoscaling:
        environment |= {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
    return environment


def _autoscaler_config(gcs_address: str, num_cpus: int, num_gpus: int, nodes: NodeScaling) -> dict[str, Any]:
    """What the missing example.yaml would say."""
    worker: dict[str, float] = {
        "CPU": nodes.cpus_per_node,
        "GPU": nodes.gpus_per_node,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    worker |= nodes.resources
    return {
        "cluster_name": "expertmesh",
        "max_workers": nodes.max_nodes,
        "upscaling_speed": 100,
        "idle_timeout_minutes": nodes.idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _FAKE_HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
        },
        "auth": {},
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": num_cpus, "GPU": num_gpus},
                "node_config": {},
                "max_workers": 0,
            },
            "expert": {
                "resources": worker,
                "node_config": {},
                "min_workers": nodes.min_nodes,
                "max_workers": nodes.max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _wait_until_up(process: "subprocess.Popen[bytes]", log_file: Path) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log_file.read_text():
        if process.poll() is not None or time.monotonic() > end_s:
            last = " | ".join(log_file.read_text().strip().splitlines()[-3:])
            ended = "ended" if process.poll() is not None else f"did not start within {START_TIMEOUT_S:g} s"
            raise Unavailable(f"local Ray {ended}: {last}")
        time.sleep(0.05)


def _gone(condition: Any, timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _session_of(pid: int) -> int | None:
    """The session of a live process; None if it is gone or a zombie."""
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError, psutil.Error):
        return None


def _command_of(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
        return command
    except psutil.Error:
        return []


def _free_port() -> int:
    """A port nobody listens on, below the range from which the kernel takes the ports of outgoing connections: Ray
    binds it seconds later, and until then a busy machine would have handed one of those to somebody else."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise Unavailable("no free port in 20000..31999")
