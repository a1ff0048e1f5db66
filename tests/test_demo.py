"""The demo's parts that decide and draw: timeline, verdicts, view, picture, traffic. A whole run is `make demo`."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cluster.checking import Checks
from cluster.demo_settings import Settings, cluster_config, demo_files
from cluster.demo_timeline import (
    Event,
    Frame,
    Key,
    Phase,
    RecentSamples,
    ServerLine,
    Timeline,
    Verdict,
    judge,
    judge_answers,
    judge_time,
    ledgers_agree,
    table_rows,
)
from cluster.demo_traffic import hottest
from cluster.demo_view import DemoView, spark
from cluster.loadgen import Sample, Tally
from cluster.local_layer import LocalLayer
from cluster.picture import draw
from cluster.recording import WINDOW_TOKENS, record_states
from cluster.reference import load_reference
from cluster.verify import relative_error
from protos.checkpoint import read_model
from protos.errors import InvalidRequest
from router.ledger import RequestLedger

ROOT = Path(__file__).parent.parent
HOT: dict[str, Key] = {"german": ("3", 15)}


def frame(at_s: float, phase: str, *, copies: int = 1, servers: int = 2, dropped: float = 0.0) -> Frame:
    return Frame(
        at_s=at_s,
        phase=phase,
        wanted_tokens_per_s=1000.0,
        tokens_per_s=900.0,
        p50_s=0.01 if at_s else None,
        p99_s=0.05 if at_s else None,
        nodes=3,
        servers=tuple(
            ServerLine(
                server_id=f"s{i}",
                node="n",
                pid=100 + i,
                state="draining" if i > 2 else "serving",
                copies=40,
                queue_tokens=0,
                busy=0.5,
            )
            for i in range(servers)
        ),
        copies={("3", 15): copies},
        rerouted_share=0.1,
        dropped_share=dropped,
        failed=0,
        checked=5,
        wrong=0,
    )


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(
        frames=[
            frame(0.0, "warm-up"),
            frame(1.0, "skew", copies=2),
            frame(2.0, "skew", copies=3, servers=4, dropped=0.2),
            frame(3.0, "calm", copies=1),
        ],
        events=[Event(at_s=1.5, text="server s2 joined"), Event(at_s=2.5, text="kill -9 server s1")],
        phases=[
            Phase(name="warm-up", began_s=0.0, ended_s=1.0),
            Phase(name="skew", began_s=1.0, ended_s=3.0),
            Phase(name="calm", began_s=3.0, ended_s=4.0),
        ],
    )


def sample(ended_s: float, *, took_s: float = 0.1, rerouted: int = 0, dropped: int = 0, error: str = "") -> Sample:
    ledger = RequestLedger(pairs=20, computed=20 - dropped, rerouted=rerouted, dropped=dropped)
    return Sample(ended_s=ended_s, took_s=took_s, num_tokens=10, ledger=None if error else ledger, error=error)


def test_a_timeline_knows_its_phases_and_most_copies(timeline: Timeline) -> None:
    assert [frame.at_s for frame in timeline.of_phase("skew")] == [1.0, 2.0]
    assert timeline.most_copies(("3", 15), "skew") == 3
    assert timeline.most_copies(("0", 0), "skew") == 0
    assert timeline.most_copies(("3", 15), "none") == 0


def test_a_draining_server_does_not_count_as_serving(timeline: Timeline) -> None:
    assert timeline.frames[2].num_serving == 3


def test_the_table_puts_phases_and_events_in_order_of_time(timeline: Timeline) -> None:
    assert [text for _, text in table_rows(timeline)] == [
        "── warm-up",
        "── skew",
        "server s2 joined",
        "kill -9 server s1",
        "── calm",
    ]


def test_a_timeline_is_json(timeline: Timeline) -> None:
    document = json.loads(json.dumps(timeline.to_json(), allow_nan=False))
    assert document["frames"][2]["copies"] == {"3/15": 3}
    assert document["frames"][2]["servers"] == 3
    assert document["phases"][0] == {"name": "warm-up", "began_s": 0.0, "ended_s": 1.0}


def test_recent_samples_forget_what_is_old() -> None:
    recent = RecentSamples()
    assert recent.summary(0.0) == (0.0, None, None, 0.0, 0.0)
    for i in range(100):
        recent.add(sample(i / 10, rerouted=5, dropped=2))
    recent.add(sample(9.95, error="Unavailable"))
    tokens_per_s, p50_s, p99_s, rerouted, dropped = recent.summary(10.0)
    assert tokens_per_s == 100.0  # ten of ten tokens in the last second; the failure has none
    assert p50_s == pytest.approx(0.1)
    assert p99_s == pytest.approx(0.1)
    assert rerouted == pytest.approx(0.25)
    assert dropped == pytest.approx(0.1)
    assert recent.summary(100.0) == (0.0, None, None, 0.0, 0.0)


def test_a_broken_promise_fails_and_a_missed_time_is_only_slow() -> None:
    assert judge("p", True, "d") == Verdict(promise="p", outcome="OK", detail="d")
    assert judge("p", False, "d").outcome == "FAILED"
    assert judge_time("p", 1.0, target_s=1.5).outcome == "OK"
    assert judge_time("p", 2.0, target_s=1.5).outcome == "SLOW"
    assert judge_time("p", None, target_s=1.5).outcome == "FAILED"


def test_a_failed_request_or_a_wrong_answer_or_none_checked_breaks_the_promise() -> None:
    tally = Tally()
    tally.totals.requests = 10
    assert judge_answers(tally, Checks(checked=3)).outcome == "OK"
    assert judge_answers(tally, Checks()).outcome == "FAILED"
    wrong = judge_answers(tally, Checks(checked=3, wrong=1, first_wrong="layer 2: off"))
    assert wrong.outcome == "FAILED"
    assert "layer 2: off" in wrong.detail
    tally.totals.failed_requests = 1
    assert judge_answers(tally, Checks(checked=3)).outcome == "FAILED"


def test_ledgers_agree_to_the_pair() -> None:
    ours = {"pairs": 1000.0, "dropped": 7.0, "dropped_gate_mass": 3.14159}
    assert ledgers_agree(ours, ours | {"dropped_gate_mass": 3.14160}) == []
    assert ledgers_agree(ours, ours | {"dropped": 8.0}) == ["dropped: 7 here, 8 at the router"]
    assert len(ledgers_agree(ours, ours | {"dropped_gate_mass": 3.2})) == 1


def test_a_spark_line_shows_rise_and_fall() -> None:
    assert spark([], width=3) == "   "
    assert spark([0, 0, 4, 4, 8, 8], width=3) == " ▄█"
    assert spark([3], width=4, top=6) == "▄▄▄▄"


def test_plain_output_has_lines_and_every_event_once(timeline: Timeline) -> None:
    out = io.StringIO()
    view = DemoView(Console(file=out, width=200), emulation="EMULATION: slow", hot=HOT)
    with view.live() as show:
        for shown in timeline.frames:
            show(timeline, shown)
    text = out.getvalue()
    assert text.count("server s2 joined") == 1
    assert "EMULATION: slow" in text
    assert "[warm-up] 900 tokens/s, p50 -" in text
    assert "expert 15@3 x1 (german)" in text


def test_the_panel_says_what_is_emulated(timeline: Timeline) -> None:
    out = io.StringIO()
    console = Console(file=out, width=140)
    view = DemoView(console, emulation="EMULATION: slow", hot=HOT)
    console.print(view.panel(timeline, timeline.frames[2]))
    text = out.getvalue()
    for part in ("EMULATION: slow", "phase: skew", "3 on 3 nodes", "●●● 3 live copies", "dropped", "20.0%", "s3"):
        assert part in text


def test_the_summary_names_every_promise(timeline: Timeline, tmp_path: Path) -> None:
    out = io.StringIO()
    view = DemoView(Console(file=out, width=160), emulation="EMULATION: slow", hot=HOT)
    view.summary(
        timeline, [judge("grows", True, "2 to 4"), judge("shrinks", False, "4 to 3")], tmp_path / "picture.png"
    )
    text = out.getvalue()
    assert "OK" in text
    assert "FAILED" in text
    assert "4 to 3" in text
    assert "picture.png" in text


def test_the_picture_is_written(timeline: Timeline, tmp_path: Path) -> None:
    draw(timeline, tmp_path / "demo.png", hot=HOT, subtitle="EMULATION: slow")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_frames_still_has_a_picture(tmp_path: Path) -> None:
    draw(Timeline(), tmp_path / "empty.png", hot=HOT, subtitle="")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_recorded_states_are_what_the_blocks_of_the_model_receive(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, texts = demo_files(ROOT)
    spec = read_model(model)
    states = record_states(spec, texts, max_tokens=2 * WINDOW_TOKENS + 5)
    assert set(states) == {"german", "table"}
    reference = load_reference(spec)
    for layer, x_ND in states["german"].items():
        assert x_ND.shape == (2 * WINDOW_TOKENS, spec.dim)
        expected_TD = reference.output(layer, x_ND[:64])
        assert relative_error(LocalLayer(spec, layer)(x_ND[:64])[0], expected_TD) <= 1e-5
    # The hot spot of a domain is real, and moves with the domain: what the demo is about.
    assert hottest(states["german"], spec)[0] != hottest(states["table"], spec)[0]
    assert len(hottest(states["german"], spec)) == len(spec.layers)
    short = tmp_path / "short.txt"
    short.write_text("zu kurz")
    with pytest.raises(InvalidRequest, match="at least 256 are needed"):
        record_states(spec, {"german": short}, max_tokens=1000)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        record_states(spec, {"german": tmp_path / "none.txt"}, max_tokens=1000)


def test_the_demo_s_cluster_starts_small_and_may_double() -> None:
    settings = Settings()
    spec = read_model(demo_files(ROOT)[0])
    config = cluster_config(settings, spec)
    pool = config.experts
    assert pool.max_servers >= 2 * pool.min_servers
    assert pool.settings.emulated_tokens_per_s == settings.emulated_pairs_per_s
    copies = pool.settings.budget_bytes // (4 * spec.expert_params)
    assert pool.min_servers * copies >= len(spec.layers) * spec.num_experts, "one copy of everything has to fit"
    # Otherwise the load step would not need more servers, or more than there may be.
    heavy_pairs_per_s = settings.heavy_tokens_per_s * spec.top_k
    assert pool.min_servers * settings.emulated_pairs_per_s < heavy_pairs_per_s
    assert heavy_pairs_per_s < pool.max_servers * settings.emulated_pairs_per_s
