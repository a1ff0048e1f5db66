"""What people are told: balance by layer, the hottest experts and where they are, why copies moved."""

from typing import Any

import numpy as np
import pytest

from cluster.overview import layer_balance, mass_at_risk
from cluster.status_view import status_lines
from router.table import CopyShare, PlacementTable


def table(copies: dict[tuple[str, int], dict[str, float]]) -> PlacementTable:
    held = {
        key: tuple(CopyShare(server_id=server_id, share=share) for server_id, share in shares.items())
        for key, shares in copies.items()
    }
    return PlacementTable(epoch=1, servers=(), copies=held, num_experts=2)


def test_balance_is_mean_over_fullest_server_in_units_of_its_speed() -> None:
    found = layer_balance(
        table({("0", 0): {"a": 0.5, "b": 0.5}, ("0", 1): {"a": 1.0}, ("1", 0): {"a": 1.0}, ("1", 1): {"b": 1.0}}),
        ("0", "1", "2"),
        np.array([[2.0, 1.0], [3.0, 1.0], [0.0, 0.0]]),
        {"a": 1.0, "b": 1.0},
    )
    assert found == {"0": pytest.approx(1.5 / 2), "1": pytest.approx(2 / 3)}
    unequal = layer_balance(
        table({("0", 0): {"a": 1.0}, ("0", 1): {"b": 1.0}}), ("0",), np.array([[3.0, 1.0]]), {"a": 3, "b": 1}
    )
    assert unequal == {"0": pytest.approx(1.0)}


def test_a_server_that_holds_nothing_counts_in_the_mean() -> None:
    found = layer_balance(table({("0", 0): {"a": 1.0}}), ("0",), np.array([[1.0, 0.0]]), {"a": 1.0, "b": 1.0})
    assert found == {"0": pytest.approx(0.5)}


def test_mass_at_risk_is_what_the_worst_loss_would_take_of_the_live_copies() -> None:
    copies = {("0", 0): {"a": 0.5, "b": 0.5}, ("0", 1): {"a": 1.0}, ("1", 0): {"b": 1.0}, ("1", 1): {"b": 1.0}}
    load_LE = np.array([[50.0, 30.0], [10.0, 10.0]])
    assert mass_at_risk(table(copies), ("0", "1"), load_LE, losses=1) == pytest.approx(0.3)
    assert mass_at_risk(table(copies), ("0", "1"), load_LE, losses=2) == pytest.approx(1.0)
    assert mass_at_risk(table({}), ("0", "1"), load_LE, losses=1) == 0.0


def test_the_status_for_people_says_where_the_load_is_and_why_copies_moved() -> None:
    status: dict[str, Any] = {
        "model": "m",
        "epoch": 7,
        "router": {"grpc": "h:1", "http": "h:2"},
        "servers": [
            {
                "id": "s0", "grpc": "h:3", "pool": "cheap", "node": "n", "pid": 1, "state": "serving", "copies": 3,
                "loading": 2, "bytes": 2**20, "budget_bytes": 2**21, "queue_tokens": 0, "busy": 0.5,
            }
        ],
        "single_copy_experts": [["0", 1]],
        "missing_experts": [],
        "outstanding_copies": 2,
        "mass_at_risk": 0.125,
        "balancedness": {"0": 0.9, "1": 0.7},
        "demand": {"pairs_per_s": 1000.0, "forecast": {"predicted": 1.0, "actual": 1.0, "error": 0.2, "noise": 0.1}},
        "experts": [{"layer": "0", "expert": 1, "copies": 1, "pairs_per_s": 600.0, "servers": {"s0": 1.0}}],
        "events": [{"at_s": 0.0, "epoch": 7, "kind": "plan", "detail": "1 load for load"}],
    }  # fmt: skip
    text = "\n".join(status_lines(status))
    for part in (
        "pool cheap", "3 copies and 2 loading", "2 copies under way", "up to 12.5% of the load", "in layer 1 0.70",
        "forecast 20% off", "layer 0 expert 1: 600 pairs/s on s0 100%", "plan: 1 load for load",
    ):  # fmt: skip
        assert part in text
