"""The demo on a screen: a live panel in a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.demo_timeline import Frame, Key, Timeline, Verdict, table_rows

PLAIN_LINE_S = 2.0
_SPARKS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"OK": "bold green", "SLOW": "bold yellow", "FAILED": "bold red"}


class DemoView:
    """Shows what happens. `emulation` is said wherever figures are.

    Args:
        console: where to; a terminal gets the live panel.
        emulation: what is emulated, in words.
        hot: label to hottest expert, for the copies shown.
    """

    def __init__(self, console: Console, *, emulation: str, hot: dict[str, Key]) -> None:
        self._console = console
        self._emulation = emulation
        self._hot = hot
        self._live: Live | None = None
        self._said = 0
        self._line_s = 0.0

    def say(self, text: str) -> None:
        """A line of progress."""
        self._console.print(text, style="dim", highlight=False)

    @contextmanager
    def live(self) -> Iterator[Callable[[Timeline, Frame], None]]:
        """Yields what to call with every frame."""
        if not self._console.is_terminal:
            self._console.print(self._emulation, highlight=False)
            yield self._plain
            return
        with Live(console=self._console, refresh_per_second=5, transient=True) as live:
            yield lambda timeline, frame: live.update(self.panel(timeline, frame))

    def panel(self, timeline: Timeline, frame: Frame) -> RenderableType:
        """One picture of the system."""
        figures = Table.grid(padding=(0, 2))
        for _ in range(6):
            figures.add_column(no_wrap=True)
        figures.add_row(
            *("tokens/s", f"[bold]{frame.tokens_per_s:>7,.0f}[/] of {frame.wanted_tokens_per_s:,.0f} offered"),
            *("p50 / p99", f"[bold]{_ms(frame.p50_s)} / {_ms(frame.p99_s)}[/]"),
            *("checked", f"{frame.checked:,}, wrong {_alarm(frame.wrong)}, failed {_alarm(frame.failed)}"),
        )
        figures.add_row(
            *("servers", f"[bold]{frame.num_serving}[/] on {frame.nodes} nodes"),
            *("rerouted", f"[bold]{frame.rerouted_share:.1%}[/]"),
            *("dropped", f"[bold]{frame.dropped_share:.1%}[/]"),
        )
        return Panel(
            Group(
                Text(self._emulation, style="black on yellow"),
                "",
                figures,
                "",
                self._history(timeline, frame),
                "",
                self._servers(frame),
                "",
                *(
                    Text(f"{event.at_s:6.1f} s  {event.text}", style="dim", overflow="ellipsis", no_wrap=True)
                    for event in timeline.events[-6:]
                ),
            ),
            title=f"expertmesh demo · {frame.at_s:5.1f} s · phase: [bold]{frame.phase or 'end'}[/]",
            border_style="cyan",
        )

    def _history(self, timeline: Timeline, now: Frame) -> Table:
        frames = timeline.frames[-300:]
        table = Table.grid(padding=(0, 2))
        table.add_row("load", spark([frame.tokens_per_s for frame in frames]), "tokens/s, last 60 s")
        table.add_row("servers", spark([frame.num_serving for frame in frames], top=6), "")
        for label, key in self._hot.items():
            copies = now.copies.get(key, 0)
            table.add_row(
                f"expert {key[1]} of layer {key[0]}",
                spark([frame.copies.get(key, 0) for frame in frames], top=6),
                f"[magenta]{'●' * copies}[/] {copies} live copies (hottest on {label})",
            )
        return table

    def _servers(self, frame: Frame) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("server", "node", "pid", "state", "copies", "queue", "busy"):
            table.add_column(name, no_wrap=True)
        for server in frame.servers:
            bar = "█" * round(10 * min(server.busy, 1.0))
            table.add_row(
                server.server_id,
                server.node,
                str(server.pid),
                server.state if server.state == "serving" else f"[yellow]{server.state}[/]",
                str(server.copies),
                f"{server.queue_tokens:,}",
                f"[cyan]{bar:<10}[/] {server.busy:4.0%}",
            )
        return table

    def _plain(self, timeline: Timeline, frame: Frame) -> None:
        for event in timeline.events[self._said :]:
            self._console.print(f"{event.at_s:6.1f} s  {event.text}", highlight=False, soft_wrap=True)
        self._said = len(timeline.events)
        if time.monotonic() < self._line_s + PLAIN_LINE_S:
            return
        self._line_s = time.monotonic()
        copies = ", ".join(
            f"expert {key[1]}@{key[0]} x{frame.copies.get(key, 0)} ({label})" for label, key in self._hot.items()
        )
        self._console.print(
            f"{frame.at_s:6.1f} s  [{frame.phase}] {frame.tokens_per_s:,.0f} tokens/s, p50 {_ms(frame.p50_s)}, "
            f"p99 {_ms(frame.p99_s)}, {frame.num_serving} servers on {frame.nodes} nodes, {copies}, "
            f"rerouted {frame.rerouted_share:.1%}, dropped {frame.dropped_share:.1%}, failed {frame.failed}, "
            f"wrong {frame.wrong} of {frame.checked}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def summary(self, timeline: Timeline, verdicts: Sequence[Verdict], picture: Path | None) -> None:
        """The end: what happened when, and what became of every promise."""
        story = Table(title="Timeline", box=None, padding=(0, 2), title_style="bold", show_header=False)
        story.add_column(justify="right", no_wrap=True)
        story.add_column(overflow="fold")
        for at, text in table_rows(timeline):
            story.add_row(at, Text(text, style="bold cyan" if text.startswith("──") else ""))
        promises = Table(title="Promises", box=None, padding=(0, 2), title_style="bold", show_header=False)
        promises.add_column(no_wrap=True)
        promises.add_column(overflow="fold")
        promises.add_column(overflow="fold", style="dim")
        for verdict in verdicts:
            promises.add_row(Text(verdict.outcome, style=_COLOURS[verdict.outcome]), verdict.promise, verdict.detail)
        self._console.print("", story, "", promises, "", self._emulation, highlight=False)
        if picture is not None:
            self._console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def spark(values: Sequence[float], *, width: int = 40, top: float | None = None) -> str:
    """A line of block characters: the values' means over `width` parts, scaled to `top` or to the largest."""
    if not values:
        return " " * width
    parts = [values[len(values) * i // width : max(len(values) * (i + 1) // width, len(values) * i // width + 1)]
             for i in range(width)]  # fmt: skip
    means = [sum(part) / len(part) if part else 0.0 for part in parts]
    most = top or max(max(means), 1e-9)
    return "".join(_SPARKS[min(8, round(8 * mean / most))] for mean in means)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:,.0f} ms"


def _alarm(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "0"
