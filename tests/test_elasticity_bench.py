"""What the elasticity benchmark counts, on loads small enough to do by hand."""

import json
import math
import socketserver
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.elasticity_slo import (
    INSIDE_WINDOW_S,
    Outcome,
    clairvoyant_server_s,
    due_between,
    goodput,
    outcome,
    percentile_s,
    recovery_s,
    server_seconds,
    servers_needed,
    violations,
)
from benchmarks.elasticity_stage import ATTEMPTS, STOLEN_CORES, least_disturbed
from benchmarks.elasticity_stock import StockPolicy
from cluster.loadgen import Sample
from router.ledger import RequestLedger

SLO_S = 0.1


def load(*, seconds: float, late: Iterable[tuple[float, float]] = (), per_s: int = 100) -> list[Outcome]:
    """Requests at a steady rate from 0 on, those due in the spans `late` answered after twice the SLO."""
    spans = list(late)
    due = [i / per_s for i in range(round(seconds * per_s))]
    return [
        Outcome(due_s=at_s, took_s=2 * SLO_S if any(begin <= at_s < end for begin, end in spans) else SLO_S / 2)
        for at_s in due
    ]


def test_a_request_belongs_to_the_moment_it_was_due() -> None:
    answered = outcome(Sample(ended_s=5.0, took_s=3.0, num_tokens=1, ledger=RequestLedger(epoch=7)))
    assert answered == Outcome(due_s=2.0, took_s=3.0, epoch=7)


def test_a_failed_request_is_outside_of_every_slo() -> None:
    failed = outcome(Sample(ended_s=5.0, took_s=0.01, num_tokens=1, error="Unavailable"))
    assert goodput([failed], slo_s=1e9) == 0.0
    assert percentile_s([failed], 50) is None


def test_goodput_is_the_share_answered_in_time() -> None:
    assert goodput(load(seconds=4, late=[(1, 2)]), SLO_S) == 0.75
    assert goodput([], SLO_S) == 0.0


def test_requests_are_found_by_when_they_were_due() -> None:
    found = due_between(load(seconds=4), 1.0, 2.0)
    assert (len(found), found[0].due_s, found[-1].due_s) == (100, 1.0, 1.99)


def test_a_single_late_request_of_two_hundred_is_no_violation() -> None:
    outcomes = load(seconds=6, late=[(3.0, 3.01)])
    assert violations(outcomes, begin_s=0, end_s=6, slo_s=SLO_S) == []
    assert recovery_s(outcomes, onset_s=0, end_s=6, slo_s=SLO_S) == 0.0


def test_a_violation_lasts_from_its_first_to_its_last_late_request() -> None:
    outcomes = load(seconds=20, late=[(2.0, 2.5), (12.0, 12.3)])
    assert violations(outcomes, begin_s=0, end_s=20, slo_s=SLO_S) == [
        pytest.approx((2.0, 2.49)),
        pytest.approx((12.0, 12.29)),
    ]


def test_late_requests_less_than_a_window_apart_are_one_violation() -> None:
    outcomes = load(seconds=10, late=[(2.0, 2.2), (3.0, 3.2), (4.0, 4.2)])
    assert violations(outcomes, begin_s=0, end_s=10, slo_s=SLO_S) == [pytest.approx((2.0, 4.19))]


def test_recovery_is_the_time_until_the_last_late_request() -> None:
    outcomes = load(seconds=10, late=[(2.5, 3.0), (3.5, 4.0)])
    assert recovery_s(outcomes, onset_s=2.0, end_s=10, slo_s=SLO_S) == pytest.approx(1.99)


def test_a_cluster_that_is_late_to_the_end_has_not_recovered() -> None:
    outcomes = load(seconds=10, late=[(2.0, 10.0)])
    assert recovery_s(outcomes, onset_s=2.0, end_s=10, slo_s=SLO_S) is None


def test_lateness_before_the_onset_does_not_count() -> None:
    outcomes = load(seconds=10, late=[(0.0, 2.0)])
    assert recovery_s(outcomes, onset_s=2.0, end_s=10, slo_s=SLO_S) == 0.0


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_violations_are_apart_in_order_and_between_late_requests(late: list[bool]) -> None:
    outcomes = [Outcome(due_s=i / 50, took_s=1.0 if slow else 0.01) for i, slow in enumerate(late)]
    spans = violations(outcomes, begin_s=0, end_s=len(late) / 50, slo_s=SLO_S)
    slow_s = {o.due_s for o in outcomes if o.took_s > SLO_S}
    assert all(begin in slow_s and end in slow_s and begin <= end for begin, end in spans)
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert bool(spans) <= bool(slow_s)
    if goodput(outcomes, SLO_S) < 0.99 and outcomes[-1].due_s < INSIDE_WINDOW_S:
        assert spans


@pytest.mark.parametrize(("pairs_per_s", "servers"), [(0.0, 2), (600.0, 2), (601.0, 3), (1200.0, 4), (9999.0, 5)])
def test_servers_needed_keep_the_busy_share(pairs_per_s: float, servers: int) -> None:
    assert servers_needed(pairs_per_s, server_pairs_per_s=500, busy=0.6, least=2, most=5) == servers


def test_the_clairvoyant_has_exactly_the_servers_of_each_moment() -> None:
    found = clairvoyant_server_s(
        lambda at_s: 290.0 if at_s < 5 else 590.0, duration_s=10, server_pairs_per_s=500, busy=0.6, least=1, most=9
    )
    assert found == pytest.approx(5 * 1 + 5 * 2)


def test_server_seconds_are_the_integral_of_what_was_seen() -> None:
    counts = [(0.0, 2), (10.0, 4), (20.0, 3)]
    assert server_seconds(counts, begin_s=5.0, end_s=25.0) == pytest.approx(5 * 2 + 10 * 4 + 5 * 3)
    assert server_seconds(counts, begin_s=11.0, end_s=12.0) == pytest.approx(4)


class Status(BaseHTTPRequestHandler):
    """A cluster's status, as far as the stock policy reads it."""

    def do_GET(self) -> None:
        body = json.dumps({"routers": [{"queued_tokens": 48}, {"queued_tokens": 16}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("stolen", "counts", "attempts"),
    [([0.0], 0, 1), ([STOLEN_CORES], 0, 1), ([0.4, 0.05], 1, 2), ([0.4, 0.2, 0.3], 1, ATTEMPTS)],
)
def test_an_arm_is_repeated_while_other_machines_take_the_cores(
    stolen: list[float], counts: int, attempts: int
) -> None:
    left = iter(enumerate(stolen))

    def attempt() -> tuple[int, dict[str, object]]:
        number, cores = next(left)
        return number, {"failed": 0, "cores_busy": {"stolen": cores}}

    told, account = least_disturbed(attempt)
    assert told == counts
    assert account["stolen_in_attempts"] == stolen
    assert len(stolen) == attempts


def test_the_stock_policy_is_serves_formula_on_the_open_calls() -> None:
    ctx = SimpleNamespace(
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 2.0),
        current_num_replicas=3,
        target_num_replicas=3,
        policy_state={},
    )
    with HTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        policy = StockPolicy(status_url=f"http://127.0.0.1:{server.server_port}", tokens_per_request=16)
        end_s = time.monotonic() + 10
        # 64 open tokens are 4 requests, each a call to every server: 12 calls, of which Serve wants 2 per replica.
        while not math.isclose(policy(ctx)[0], 6.0) and time.monotonic() < end_s:
            time.sleep(0.01)
        server.shutdown()
    assert math.isclose(policy(ctx)[0], 6.0)


def test_the_stock_policy_survives_a_port_that_speaks_something_else() -> None:
    class Garbage(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"\x00\x00\x12\x04\x00\x00\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        StockPolicy(status_url=f"http://127.0.0.1:{server.server_address[1]}", tokens_per_request=16).look()
        server.shutdown()
