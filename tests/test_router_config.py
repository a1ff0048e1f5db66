"""Router settings: what is refused names the field and the value; requests override parts of the overflow policy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protos.errors import InvalidRequest
from router.config import OverflowConfig, RouterConfig
from tests.strategies import policies


def test_the_default_policy_is_lossless_and_dropless() -> None:
    policy = OverflowConfig()
    assert policy.chain == ("copy", "wait", "fail")
    assert policy.capacity_factor is None
    assert not policy.needs_scores


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chain": ()}, "chain is empty"),
        ({"chain": ("copy", "copy")}, r"chain \['copy', 'copy'\] names 'copy' twice"),
        ({"chain": ("drop", "wait")}, r"chain \['drop', 'wait'\] has 'wait' after 'drop'"),
        ({"chain": ("fail", "drop")}, r"has 'drop' after 'fail'"),
        ({"chain": ("steal",)}, "chain"),
        ({"unavailable_chain": ()}, "unavailable_chain is empty"),
        ({"unavailable_chain": ("copy",)}, "unavailable_chain"),
        ({"unavailable_chain": ("fail", "wait")}, r"unavailable_chain \['fail', 'wait'\] has 'wait' after 'fail'"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": float("inf")}, "capacity_factor"),
        ({"min_capacity": 0}, "min_capacity"),
        ({"max_score_gap": -0.1}, "max_score_gap"),
        ({"keep": "luck"}, "keep"),
        ({"capacity": 3}, "capacity"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OverflowConfig(**fields)


def test_a_router_that_could_not_accept_its_largest_request_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_queued_tokens \(10\) is below max_request_tokens \(8192\)"):
        RouterConfig(max_queued_tokens=10)


def test_every_setting_says_why_it_exists() -> None:
    for config in (OverflowConfig, RouterConfig):
        assert all(field.description for field in config.model_fields.values())


@given(policies())
def test_an_empty_override_changes_nothing(policy: OverflowConfig) -> None:
    assert policy.override() is policy


def test_an_override_replaces_only_what_it_sets() -> None:
    policy = OverflowConfig(min_capacity=7, unavailable_chain=("drop",))
    changed = policy.override(chain=["next_expert", "drop"], capacity_factor=1.25, max_score_gap=0.0, renormalize=True)
    assert changed == OverflowConfig(
        min_capacity=7,
        unavailable_chain=("drop",),
        chain=("next_expert", "drop"),
        capacity_factor=1.25,
        max_score_gap=0.0,
        renormalize=True,
    )
    assert changed.needs_scores
    assert changed.override(keep="position", renormalize=False).keep == "position"


def test_a_float32_field_of_the_wire_is_read_as_the_decimal_it_was_written_from() -> None:
    assert OverflowConfig().override(capacity_factor=float(np.float32(1.1))).capacity_factor == 1.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chain": ["wait", "wait"]}, r"overflow policy: chain \['wait', 'wait'\] names 'wait' twice"),
        ({"chain": ["vanish"]}, r"overflow policy: chain.0 is 'vanish'"),
        ({"capacity_factor": -1.0}, r"overflow policy: capacity_factor is -1.0"),
        ({"capacity_factor": float("nan")}, r"overflow policy: capacity_factor is nan"),
        ({"max_score_gap": -0.5}, r"overflow policy: max_score_gap is -0.5"),
        ({"keep": "luck"}, r"overflow policy: keep is 'luck'"),
    ],
)
def test_an_impossible_override_is_an_invalid_request_that_names_field_and_value(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        OverflowConfig().override(**fields)


@given(st.builds(RouterConfig))
def test_settings_survive_a_round_trip_through_json(config: RouterConfig) -> None:
    assert RouterConfig.model_validate_json(config.model_dump_json()) == config
