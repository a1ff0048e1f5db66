"""Elasticity on a real cluster: goodput under a moving hot spot, recovery, re-placements, server-seconds over a day.

    python -m benchmarks.elasticity [--only a,b,c,d] [--short] [--out FILE]

Every arm is a cluster of its own on a Ray of its own (local, fake GPU nodes) whose servers are paced to a slow device's
rate. It gets an open-loop load, and requests are judged by when they were due. An arm during which the host gave more
than 0.1 cores to other machines is repeated, at most twice; the one with the least of that counts, and what was stolen
in every attempt is in its account. Fixed before anything is measured:

    SLO      4 times the p50 latency of the cluster at 5 % load, uniform (measured first)
    load     60 % of what the servers can compute, zipf(1.2) over 32 experts of one layer, top-2
    inside   p99 is: of the requests due in the next 6 s, at least 99 % were answered within the SLO

    a  goodput while the hot spot moves, with memory for 3 and for 1.25 copies of every expert, beside uniform load and
       static placements (max_moves: 0) of one copy of every expert and of 3; with the number of servers free also
       beside Serve's stock queue-length policy with its own delays and with ours
    b  seconds from a hot spot's onset until the cluster is inside the SLO for good, where copies suffice and where
       servers must start
    c  90 re-placements of larger copies under 30 % load: failed requests, wrong answers, p99 of the requests that were
       open meanwhile over p99 before; beside it the same moving hot spot without any re-placement
    d  two short days: server-seconds over those of clairvoyants that aim for the same busy share and for the highest
       that keeps the SLO, longest time outside the SLO
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import elasticity_parts as parts
from benchmarks.document import publish
from benchmarks.elasticity_parts import SHORT, Facts, Lengths, Story
from benchmarks.elasticity_slo import INSIDE_SHARE, INSIDE_WINDOW_S
from benchmarks.elasticity_stage import (
    BUDGET_COPIES,
    EMULATED_PAIRS_PER_S,
    MODEL,
    SKEW,
    TOKENS_PER_REQUEST,
    make_config,
    perform,
)
from benchmarks.elasticity_stock import stock_autoscaling
from benchmarks.processes import make_model
from cluster.config import ClusterConfig
from cluster.console import interruptible

SERVERS = 4  # of the parts whose number of servers is fixed
LEAST, MOST = 2, 5  # of the others
SLO_FACTOR = 4.0
STATIC_COPIES = 3  # fill the servers' memory, as the copies of a placement that follows the load may
SCARCE_COPIES = 10  # of one server: 1.25 copies of every expert in all of them
LARGE_HIDDEN_DIM = 2048  # of part c, whose copies take a while to load: 1.5 MiB
LOAD = 0.6  # of what SERVERS can compute
DOWNSCALE_DELAY_S = 5.0
TIGHT = {"target_busy": 0.75, "upscale_busy": 0.75, "downscale_delay_s": 5.0}  # of part d: few servers
PARTS = "abcd"


class Run:
    """One run: its models, the SLO once it is known, and the story of every arm on a cluster of its own."""

    def __init__(self, folder: Path, lengths: Lengths) -> None:
        self.lengths = lengths
        self.slo_s = 0.0
        self._folder = folder

    def arm(
        self,
        name: str,
        story: Story,
        *,
        servers: tuple[int, int] = (SERVERS, SERVERS),
        pattern: str = SKEW,
        budget_copies: int = BUDGET_COPIES,
        hidden_dim: int = MODEL["hidden_dim"],
        deployed: Callable[[ClusterConfig], AbstractContextManager[None]] = lambda config: nullcontext(),
        **sections: Mapping[str, Any],
    ) -> Facts:
        """Tell a story on a cluster of its own; `deployed` is around its deployment and life."""
        say(name)
        sections = {"scaling": {"downscale_delay_s": DOWNSCALE_DELAY_S}} | sections
        model = self._folder / f"model-{hidden_dim}"
        if not model.exists():
            make_model(model, **MODEL | {"hidden_dim": hidden_dim})
        config = make_config(model, least=servers[0], most=servers[1], budget_copies=budget_copies, **sections)
        with deployed(config):
            told, account = perform(config, pattern, 1, story)
        found = told | {"account": account}
        brief = {
            name: value for name, value in found.items() if name not in ("onsets", "servers", "scaling", "seconds")
        }
        say(f"  {json.dumps(brief, default=str)}")
        return found

    def calibrate(self) -> Facts:
        """The SLO: 4 times the unloaded p50."""
        story = partial(parts.unloaded, lengths=self.lengths, pairs_per_s=0.05 * SERVERS * EMULATED_PAIRS_PER_S)
        found = self.arm("unloaded", story, pattern="uniform")
        self.slo_s = SLO_FACTOR * found["p50_s"]
        return found

    def part_a(self) -> Facts:
        story = partial(
            parts.moving_hot_spot,
            lengths=self.lengths,
            pairs_per_s=LOAD * SERVERS * EMULATED_PAIRS_PER_S,
            slo_s=self.slo_s,
        )
        prompt: dict[str, Any] = {
            "metrics_interval_s": 0.1,
            "look_back_period_s": 0.3,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        }
        free = (LEAST, MOST)
        arms: dict[str, Callable[[], Facts]] = {
            "uniform": partial(self.arm, "a uniform load", story, pattern="uniform"),
            "ours": partial(self.arm, "a moving hot spot", story),
            "ours_scarce": partial(
                self.arm, "a moving hot spot, memory for 1.25 copies", story, budget_copies=SCARCE_COPIES
            ),
            "static": partial(self.arm, "a static placement", story, placement={"max_moves": 0}),
            "static_copies": partial(
                self.arm,
                f"a static placement, {STATIC_COPIES} copies of every expert",
                story,
                placement={"max_moves": 0, "min_copies": STATIC_COPIES},
            ),
            "ours_scaling": partial(self.arm, "a moving hot spot, servers free", story, servers=free),
            "stock_scaling": partial(self.arm, "a Serve's stock policy", story, deployed=_stock, servers=free),
            "stock_scaling_prompt": partial(
                self.arm,
                "a Serve's stock policy, our delays",
                story,
                deployed=partial(_stock, **prompt),
                servers=free,
            ),
        }
        found = {name: arm() for name, arm in arms.items()}
        ratios = {name: rows["goodput"] / found["uniform"]["goodput"] for name, rows in found.items()}
        return {**found, "goodput_over_uniform": ratios, "targets": {"ours >= 0.9": ratios["ours"] >= 0.9}}

    def part_b(self) -> Facts:
        copy = self.arm(
            "b onsets where copies suffice",
            partial(
                parts.onsets_for_a_copy,
                lengths=self.lengths,
                pairs_per_s=LOAD * SERVERS * EMULATED_PAIRS_PER_S,
                slo_s=self.slo_s,
            ),
        )
        server = self.arm(
            "b onsets where servers must start",
            partial(
                parts.onsets_for_a_server,
                lengths=self.lengths,
                low_pairs_per_s=0.45 * LEAST * EMULATED_PAIRS_PER_S,
                high_pairs_per_s=1.1 * LEAST * EMULATED_PAIRS_PER_S,
                slo_s=self.slo_s,
            ),
            servers=(LEAST, MOST),
        )
        return {
            "copy": copy,
            "server": server,
            "targets": {
                "copy: median < 2 s": copy["median_s"] is not None and copy["median_s"] < 2,
                "server: median < 6 s": server["median_s"] is not None and server["median_s"] < 6,
            },
        }

    def part_c(self) -> Facts:
        load: dict[str, Any] = {"lengths": self.lengths, "pairs_per_s": 0.3 * SERVERS * EMULATED_PAIRS_PER_S}
        found = self.arm("c re-placements", partial(parts.replacements, **load), hidden_dim=LARGE_HIDDEN_DIM)
        alone = self.arm(
            "c the hot spot alone",
            partial(parts.hot_spot_alone, moves=found["hot_spot_moves"], **load),
            hidden_dim=LARGE_HIDDEN_DIM,
            placement={"max_moves": 0},
        )
        account = found["account"]
        return found | {
            "hot_spot_alone": alone,
            "targets": {
                "all re-placements": found["replacements"] >= self.lengths.replacements,
                "0 failed": account["failed"] == 0,
                "0 wrong": account["checks"]["wrong"] == 0 and account["checks"]["checked"] > 0,
                "p99 <= 1.3x": found["p99_ratio"] is not None and found["p99_ratio"] <= 1.3,
            },
        }

    def part_d(self) -> Facts:
        target = EMULATED_PAIRS_PER_S * TIGHT["target_busy"]
        story = partial(
            parts.diurnal,
            lengths=self.lengths,
            low_pairs_per_s=0.5 * LEAST * target,
            high_pairs_per_s=0.95 * MOST * target,
            slo_s=self.slo_s,
        )
        found = self.arm("d diurnal", story, servers=(LEAST, MOST), scaling=TIGHT)
        return found | {
            "targets": {
                "server-seconds <= 1.15x of the same busy share": found["server_s_ratio"] <= 1.15,
                "server-seconds <= 1.15x of the cheapest": found["server_s_ratio_to_cheapest"] <= 1.15,
                "no violation > 5 s": found["longest_violation_s"] <= 5,
            }
        }


def _stock(config: ClusterConfig, **timing: Any) -> AbstractContextManager[None]:
    router = config.router
    url = f"http://{router.host}:{router.http_port}{router.route_prefix.rstrip('/')}/status"
    return stock_autoscaling(status_url=url, tokens_per_request=TOKENS_PER_REQUEST, **timing)


def run(only: str, lengths: Lengths) -> Iterator[Facts]:
    """What is known after each of the chosen parts; nothing that was started is left afterwards, whatever happens."""
    torch.set_num_threads(1)  # the cores belong to the cluster
    with tempfile.TemporaryDirectory() as folder, interruptible():
        stage = Run(Path(folder), lengths)
        found: Facts = {"unloaded": stage.calibrate(), "slo_s": stage.slo_s}
        for part in only:
            found[part] = getattr(stage, f"part_{part}")()
            yield found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=PARTS, help="parts, for example a,c")
    parser.add_argument("--short", action="store_true", help="a smoke run: too short to quote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    only = args.only.replace(",", "")
    if not only or set(only) - set(PARTS):
        parser.error(f"--only is {args.only!r}, expected some of {','.join(PARTS)}")
    lengths = SHORT if args.short else Lengths()
    settings = {
        "model": MODEL,
        "emulated_pairs_per_s": EMULATED_PAIRS_PER_S,
        "tokens_per_request": TOKENS_PER_REQUEST,
        "pattern": SKEW,
        "load": LOAD,
        "servers": SERVERS,
        "servers_free": [LEAST, MOST],
        "copies_per_server": {"usual": BUDGET_COPIES, "scarce": SCARCE_COPIES},
        "hidden_dim_of_c": LARGE_HIDDEN_DIM,
        "slo": {"factor": SLO_FACTOR, "inside_share": INSIDE_SHARE, "inside_window_s": INSIDE_WINDOW_S},
        "lengths": asdict(lengths),
    }
    for found in run(only, lengths):  # a run of an hour that ends early leaves what it has
        publish({"settings": settings, **found}, packages=("grpcio", "ray", "torch", "numpy"), out=args.out)


if __name__ == "__main__":
    main()
