"""What the journal tells of a re-placement: what moved, and that it ended."""

from cluster.journal import Journal
from cluster.metrics import Metrics
from cluster.planner import Plan
from cluster.steps import Load


def test_a_replacement_whose_loads_are_overtaken_ends_and_says_what_did_not_move() -> None:
    journal = Journal(Metrics("test"))
    loads = tuple(Load(key=("0", expert), server_id="a", reason="load", gain=0.1) for expert in range(4))
    journal.planned(Plan(copies={}, steps=loads), 1 << 20, 3, 10.0)
    journal.progress(outstanding=3, overtaken=0, epoch=3, now_s=10.1)
    assert [event["kind"] for event in journal.events] == ["plan"]
    journal.progress(outstanding=0, overtaken=3, epoch=3, now_s=12.0)
    placed = journal.events[-1]
    assert (placed["kind"], placed["overtaken"], placed["bytes"], placed["took_s"]) == ("placed", 3, 1 << 20, 2.0)
    assert placed["detail"] == "4 copies (4 for load), 3 of them overtaken, 1.0 MiB in 2.00 s"
