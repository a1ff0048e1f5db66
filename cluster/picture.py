"""The demo as a picture: load, servers, copies and overflow over time, phases shaded."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed, or looked for

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cluster.demo_timeline import Key, Timeline

_SHADES = ("#eef3f8", "#fbf3e6")
_BLUE, _GREY, _ORANGE, _RED, _GREEN, _PURPLE = "#2166ac", "#9aa5b1", "#d9822b", "#c0392b", "#2e8b57", "#7b3294"
_COLOURS = (_PURPLE, _GREEN, _ORANGE, _BLUE)


def draw(timeline: Timeline, path: Path, *, hot: Mapping[str, Key], subtitle: str) -> None:
    """Write the picture.

    Args:
        hot: label to the expert whose copies are shown.
        subtitle: one line below the title; says what is emulated.
    """
    frames = timeline.frames
    at = [frame.at_s for frame in frames]
    figure, axes = plt.subplots(
        5, 1, figsize=(13, 12), sharex=True, height_ratios=(3, 2, 2, 2, 1.6), layout="constrained", dpi=110
    )
    load, latency, servers, copies, overflow = axes
    figure.suptitle(f"expertmesh demo\n{subtitle}", fontsize=13)

    load.plot(at, [frame.wanted_tokens_per_s for frame in frames], color=_GREY, ls="--", lw=1.4, label="offered")
    load.plot(at, [frame.tokens_per_s for frame in frames], color=_BLUE, lw=2.0, label="answered")
    load.set_ylabel("tokens/s")
    load.set_ylim(0, 1.3 * max((max(frame.tokens_per_s, frame.wanted_tokens_per_s) for frame in frames), default=1.0))

    latency.plot(at, [_ms(frame.p99_s) for frame in frames], color=_RED, lw=1.4, label="p99")
    latency.plot(at, [_ms(frame.p50_s) for frame in frames], color=_ORANGE, lw=1.4, label="p50")
    latency.set_ylabel("latency, ms")
    latency.set_yscale("log")
    low, high = latency.get_ylim()
    latency.set_ylim(low, 3 * high)

    servers.step(at, [frame.nodes for frame in frames], where="post", color=_GREY, lw=1.5, ls="--", label="nodes")
    servers.step(at, [frame.num_serving for frame in frames], where="post", color=_GREEN, lw=2.2, label="servers")
    servers.set_ylabel("servers, nodes")
    servers.set_ylim(0, max((max(frame.nodes, frame.num_serving) for frame in frames), default=1) + 1.4)

    for (label, key), colour in zip(hot.items(), _COLOURS, strict=False):
        copies.step(
            at,
            [frame.copies.get(key, 0) for frame in frames],
            where="post",
            lw=2.2,
            color=colour,
            label=f"expert {key[1]} of layer {key[0]}: hottest on {label}",
        )
    copies.set_ylabel("live copies")
    copies.set_ylim(0, max((max(frame.copies.values(), default=1) for frame in frames), default=1) + 1.4)

    rerouted = [100 * frame.rerouted_share for frame in frames]
    dropped = [100 * frame.dropped_share for frame in frames]
    overflow.stackplot(at, rerouted, dropped, labels=("rerouted", "dropped"), colors=(_ORANGE, _RED), alpha=0.8)
    overflow.set_ylabel("overflow, % of pairs")
    overflow.set_ylim(0, max(5.0, 1.4 * max((r + d for r, d in zip(rerouted, dropped, strict=True)), default=0.0)))
    overflow.set_xlabel("seconds")

    _shade(timeline, list(axes))
    for axis in axes:
        axis.legend(loc="upper left", ncols=4, fontsize=8, framealpha=0.9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    if at:
        load.set_xlim(0, at[-1])
    figure.savefig(path)
    plt.close(figure)


def _shade(timeline: Timeline, axes: list[Axes]) -> None:
    """Phases as alternating bands with their names above the first panel; kills as lines through all panels."""
    for i, phase in enumerate(timeline.phases):
        for axis in axes:
            axis.axvspan(phase.began_s, phase.ended_s, color=_SHADES[i % 2], zorder=0, lw=0)
        axes[0].text(
            (phase.began_s + phase.ended_s) / 2,
            1.015,
            phase.name,
            transform=axes[0].get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
        )
    for event in timeline.events:
        if event.text.startswith("kill -9"):
            for axis in axes:
                axis.axvline(event.at_s, color=_RED, lw=1.2, ls=":")


def _ms(value: float | None) -> float:
    return float("nan") if value is None else 1e3 * value
