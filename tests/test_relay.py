"""How the placement's numbers reach Serve's controller, which cannot import our code."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingPolicy

from cluster.relay import AT_LEAST, AT_MOST, FollowTarget, PublishTargets


def context(app: str, *, target: int = 2, metrics: Any = None) -> SimpleNamespace:
    return SimpleNamespace(app_name=app, target_num_replicas=target, raw_metrics=metrics)


def publish(app: str, **numbers: float) -> None:
    series = {
        name: {"replica": [TimeStampedValue(1.0, 99.0), TimeStampedValue(2.0, value)]}
        for name, value in numbers.items()
    }
    assert PublishTargets()(context(app, target=1, metrics=series)) == (1, {}), "the placement itself stays alone"


def follow(app: str, *, target: int, pool: str = "fast") -> int:
    servers, state = FollowTarget(pool=pool)(context(app, target=target))
    assert state == {}
    return servers


def test_a_pool_follows_the_latest_number_up_down_and_from_none() -> None:
    publish("a", **{f"{AT_LEAST}fast": 3.0, f"{AT_MOST}fast": 3.0, f"{AT_LEAST}cheap": 0.0, f"{AT_MOST}cheap": 0.0})
    assert [follow("a", target=target) for target in (0, 2, 3, 7)] == [3, 3, 3, 3]
    assert follow("a", target=5, pool="cheap") == 0


def test_a_placement_that_has_not_watched_long_enough_only_adds() -> None:
    publish("b", **{f"{AT_LEAST}fast": 3.0})
    assert [follow("b", target=target) for target in (2, 5)] == [3, 5]


def test_without_news_every_pool_keeps_what_it_has() -> None:
    assert follow("never heard of", target=4) == 4
    publish("c", **{f"{AT_LEAST}fast": 3.0, f"{AT_MOST}fast": 3.0})
    PublishTargets()(context("c", metrics={}))  # the placement is being replaced
    assert follow("c", target=4) == 4


def test_applications_do_not_meet() -> None:
    publish("d", **{f"{AT_LEAST}fast": 5.0, f"{AT_MOST}fast": 5.0})
    assert follow("e", target=1) == 1


@pytest.mark.parametrize("metrics", [None, {}, {f"{AT_LEAST}fast": None}, {f"{AT_LEAST}fast": {"r": [None]}}, 3])
def test_the_policies_never_raise_and_keep_what_is_there(metrics: object) -> None:
    assert PublishTargets()(context("f", metrics=metrics)) == (2, {})
    assert follow("f", target=2) == 2


def test_the_policies_work_where_our_code_is_not_installed() -> None:
    """As in Serve's controller: unpickled, one by one, in a process that cannot import `cluster`."""
    definitions = [
        AutoscalingPolicy(policy_function=policy).get_serialized_policy_def()  # type: ignore[no-untyped-call]
        for policy in (PublishTargets, FollowTarget)
    ]
    script = f"""
import pickle, sys, types
sys.modules["cluster"] = None
publish, follow = [pickle.loads(definition) for definition in {definitions!r}]
reading = types.SimpleNamespace(timestamp=1.0, value=4.0)
metrics = {{"at_least/fast": {{"a": [reading]}}, "at_most/fast": {{"a": [reading]}}}}
publish()(types.SimpleNamespace(app_name="x", target_num_replicas=1, raw_metrics=metrics))
print(follow(pool="fast")(types.SimpleNamespace(app_name="x", target_num_replicas=0)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(4, {})", done.stderr
