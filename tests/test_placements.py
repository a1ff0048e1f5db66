"""How placements are judged, on ones small enough to do by hand."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.placements import Copies, balance, balancedness, least_lost_percent, moved_percent, relabelled, survival
from benchmarks.planner_arms import PLANNERS, eplb, linear, make_servers
from cluster.planner import PlannerServer

LOAD_LE = np.array([[6.0, 2.0], [1.0, 3.0]])  # 12 in total


def make_copies(*rows: tuple[int, int, int, float]) -> Copies:
    layers, experts, servers, shares = zip(*rows, strict=True)
    return Copies(
        layer_C=np.array(layers),
        expert_C=np.array(experts),
        server_C=np.array(servers),
        share_C=np.array(shares),
        plan_s=0.0,
    )


def make_fleet(*speeds: float) -> tuple[PlannerServer, ...]:
    return tuple(PlannerServer(server_id=f"s{s}", max_copies=9, speed=speed) for s, speed in enumerate(speeds))


# Layer 0: expert 0 on both servers, expert 1 on server 1. Layer 1: both on server 0.
COPIES = make_copies((0, 0, 0, 0.5), (0, 0, 1, 0.5), (0, 1, 1, 1.0), (1, 0, 0, 1.0), (1, 1, 0, 1.0))


def test_balancedness_is_mean_over_most_loaded_server_in_units_of_its_speed() -> None:
    assert balancedness(COPIES, LOAD_LE, make_fleet(1, 1)) == pytest.approx([4 / 5, 2 / 4])
    assert balancedness(COPIES, LOAD_LE, make_fleet(3, 5)) == pytest.approx([1.0, 0.5 / (4 / 3)])
    found = balance(COPIES, LOAD_LE, make_fleet(1, 1))
    assert found == pytest.approx({"balancedness_min": 0.5, "balancedness_mean": 0.65, "extra_percent": 25.0})


def test_a_lost_server_takes_the_experts_that_only_it_holds() -> None:
    found = survival(COPIES, LOAD_LE, make_fleet(1, 1))
    assert found == pytest.approx(
        {
            "lost_mass_percent_worst_server": 100 * 4 / 12,
            "lost_mass_percent_mean": 100 * 6 / 12 / 2,
            "lost_experts_worst_server": 2,
            "single_copy_experts": 3,
        }
    )
    assert least_lost_percent(LOAD_LE, 2, 0.25) == pytest.approx(100 * 6 / 12 / 2)


def test_two_slots_on_one_server_are_no_second_copy() -> None:
    doubled = make_copies((0, 0, 0, 0.5), (0, 0, 0, 0.5), (0, 1, 1, 1.0), (1, 0, 0, 1.0), (1, 1, 1, 1.0))
    assert survival(doubled, LOAD_LE, make_fleet(1, 1))["single_copy_experts"] == 4
    assert balance(doubled, LOAD_LE, make_fleet(1, 1))["extra_percent"] == 25


def test_only_what_a_server_has_to_load_counts_as_moved() -> None:
    swapped = make_copies((0, 0, 0, 0.9), (0, 0, 1, 0.1), (0, 1, 0, 1.0), (1, 0, 0, 1.0), (1, 1, 0, 1.0))
    assert moved_percent(COPIES, COPIES, 2, 2) == 0
    assert moved_percent(COPIES, swapped, 2, 2) == pytest.approx(100 / 5)
    fewer = make_copies((0, 0, 0, 1.0), (0, 1, 1, 1.0), (1, 0, 0, 1.0), (1, 1, 0, 1.0))
    assert moved_percent(COPIES, fewer, 2, 2) == 0


@pytest.mark.parametrize("name", ["linear", "EPLB", *PLANNERS])
def test_every_arm_places_every_expert_and_its_shares_sum_to_one(name: str) -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (3, 16)) * 1e3
    servers = make_servers(load_LE, 4, 0.25)
    place = {"linear": linear, "EPLB": eplb(20), **PLANNERS}[name]
    copies = place(load_LE, servers, None, survive=0)
    copies = place(load_LE[:, ::-1].copy(), servers, copies, survive=0)
    shares = np.bincount(copies.layer_C * 16 + copies.expert_C, weights=copies.share_C, minlength=48)
    assert shares == pytest.approx(np.ones(48))
    assert np.bincount(copies.server_C, minlength=4).max() <= 15


def test_renaming_the_servers_of_a_layer_undoes_a_mere_renaming() -> None:
    renamed = replace(COPIES, server_C=np.where(COPIES.layer_C == 0, 1 - COPIES.server_C, COPIES.server_C))
    assert moved_percent(COPIES, renamed, 2, 2) > 0
    assert moved_percent(COPIES, relabelled(COPIES, renamed, 2, 2), 2, 2) == 0
