"""Settings for the whole suite, and its one real Ray."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A thread of Serve that outlives its cluster asks Ray for something now and then, and Ray would start another cluster
# to answer it. It reads this when it is imported.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

# The suite shares its cores with the servers it starts: a slow example says nothing about the code.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray with 6 fake GPUs on one node; this process is its driver. Started if a test asks for it; yields its
    address."""
    import ray
    from ray import serve

    from cluster.local import connect, local_ray

    with local_ray(num_cpus=4, num_gpus=6) as started:
        connect(started.address)
        try:
            yield started.address
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
    assert not started.pids()
