"""On a real Ray: a spare worker starts without work, and the next actor of the node takes it."""

import os
import subprocess
import sys
import time
from typing import Any

import psutil

from cluster.spare import has_room, leaves_room, may_leave_idle_class, set_idle_class, start_spare_worker


async def test_the_next_process_of_a_node_is_the_spare_one(ray_cluster: str) -> None:
    import ray

    class Worker:
        async def start_spare(self) -> bool:
            return await start_spare_worker()

        def idle(self) -> set[int]:
            workers = psutil.Process(os.getppid()).children()
            return {worker.pid for worker in workers if worker.cmdline()[:1] == ["ray::IDLE"]}

        def pid(self) -> int:
            return os.getpid()

    actor: Any = ray.remote(num_cpus=0)(Worker)
    first = actor.remote()
    before = ray.get(first.idle.remote())
    assert ray.get(first.start_spare.remote())
    end_s = time.monotonic() + 90
    while not (found := ray.get(first.idle.remote())) - before and time.monotonic() < end_s:
        time.sleep(0.1)
    assert found - before, "a spare worker has started"
    others = [actor.remote() for _ in found]
    assert set(ray.get([other.pid.remote() for other in others])) >= found - before
    for other in (first, *others):
        ray.kill(other)


def test_a_worker_starts_only_where_more_than_half_a_core_is_unused() -> None:
    assert isinstance(has_room(), bool)
    assert leaves_room(cores=2, unused_share=0.35)
    assert leaves_room(cores=1, unused_share=1.0)
    assert not leaves_room(cores=2, unused_share=0.25)  # one gentle start on a busy machine leaves less
    assert leaves_room(cores=64, unused_share=0.01)
    assert not leaves_room(cores=64, unused_share=0.0)


def test_a_process_and_its_threads_give_way_to_others_and_come_back() -> None:
    code = "import threading; threading.Thread(target=input).start(); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        threads = [int(thread) for thread in os.listdir(f"/proc/{process.pid}/task")]
        assert len(threads) == 2
        for idle in (True, False) if may_leave_idle_class() else (True,):
            set_idle_class(process.pid, idle=idle)
            policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
            assert {os.sched_getscheduler(thread) for thread in threads} == {policy}
        process.stdin.write(b"\n")
