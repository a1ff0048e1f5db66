"""What the commands print: one JSON document on standard output, everything else on standard error.

The contract of the command line: exit status 0 only on success; bad input is one line on standard error and status 2,
anything else that fails is one line and status 1.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """Ends a command with one line on standard error and an exit status."""

    def __init__(self, message: str, *, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def bad_input(message: str) -> CommandError:
    """The error for an argument, model or file that cannot be used."""
    return CommandError(message, status=BAD_INPUT)


def note(text: str) -> None:
    """Tell a person what is going on."""
    print(text, file=sys.stderr, flush=True)


def die(message: str, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    note(f"expertmesh: {' '.join(message.split())}")
    sys.exit(status)


class Output:
    """The standard output of one command: a JSON document, or lines for people, never both."""

    def __init__(self, *, as_json: bool, descriptor: int) -> None:
        self.as_json = as_json
        self._descriptor = descriptor

    def document(self, document: Mapping[str, Any]) -> None:
        """Print the document, where JSON was asked for."""
        if self.as_json:
            self._write(json.dumps(document, allow_nan=False))

    def line(self, text: str = "") -> None:
        """Print a line for people, where JSON was not asked for."""
        if not self.as_json:
            self._write(text)

    def _write(self, text: str) -> None:
        with open(os.dup(self._descriptor), "w", encoding="utf-8") as stream:
            stream.write(text + "\n")


@contextmanager
def output(*, as_json: bool) -> Iterator[Output]:
    """The standard output, kept clean: what libraries and child processes print meanwhile goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield Output(as_json=as_json, descriptor=kept)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends what is within as Ctrl-C does: with everything it started stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
