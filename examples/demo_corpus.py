"""The demo model's text: five visibly different domains, split into train and held-out without shared paragraphs.

Every text is something that a Debian machine has or installs: the Python standard library, and packages fetched with
`apt-get download` (no root needed, nothing is installed).
"""

import gzip
import hashlib
import platform
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

HELD_OUT_ONE_IN = 20  # documents; by the hash of the name, so that a new file moves no other
MAX_TRAIN_BYTES = 6_000_000  # per domain: more is never read in an hour of CPU training
MIN_UNIQUE_CHARS = 60  # shorter paragraphs ("else:", "Syntax") may occur on both sides of the split
EXCERPT_BYTES = 60_000
MAX_EXCERPT_DOCUMENT_BYTES = 8_000  # several documents per excerpt instead of one long one

Documents = Iterator[tuple[str, str]]  # (name, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One kind of text: where it comes from, its licence, and its share of every training batch."""

    name: str
    what: str
    package: str | None  # None: the standard library of the running Python
    licence: str
    read: Callable[[Path], Documents]
    separator: str  # what stands between the units that are compared to keep held-out text out of train
    sequences_per_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One domain's text after the split."""

    domain: Domain
    source: str  # package and version
    train: list[str]
    held_out: list[str]
    excerpt: str  # the part of held_out that is committed as examples/texts/<domain>.txt


def load_corpora(cache: Path) -> list[Corpus]:
    """Fetches, splits and deduplicates every domain.

    Args:
        cache: folder for downloaded packages and their unpacked files.
    """
    sources = [fetch(domain.package, cache) for domain in DOMAINS]
    splits = [split(list(domain.read(root))) for domain, (root, _) in zip(DOMAINS, sources, strict=True)]
    seen = {
        key
        for domain, (_, held_out) in zip(DOMAINS, splits, strict=True)
        for text in held_out
        for unit in text.split(domain.separator)
        if (key := unit_key(unit))
    }
    return [
        Corpus(
            domain=domain,
            source=source,
            train=list(within(MAX_TRAIN_BYTES, (drop_seen(text, domain.separator, seen) for text in train))),
            held_out=held_out,
            excerpt=excerpt(held_out),
        )
        for domain, (_, source), (train, held_out) in zip(DOMAINS, sources, splits, strict=True)
    ]


def split(documents: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Splits documents into (train, held-out) by the hash of their name, each in hash order."""
    ordered = sorted((hashlib.sha256(name.encode()).digest(), text) for name, text in documents)
    train = [text for digest, text in ordered if digest[-1] % HELD_OUT_ONE_IN]
    return train, [text for digest, text in ordered if digest[-1] % HELD_OUT_ONE_IN == 0]


def drop_seen(text: str, separator: str, seen: set[bytes]) -> str:
    """Removes the units of `text` that were met before, in held-out or in train, and remembers the rest."""
    kept = []
    for unit in text.split(separator):
        key = unit_key(unit)
        if key is None or key not in seen:
            kept.append(unit)
        if key is not None:
            seen.add(key)
    return separator.join(kept)


def unit_key(unit: str) -> bytes | None:
    """Identity of a paragraph up to white space; None when it is too short to tell texts apart."""
    normal = " ".join(unit.split())
    return hashlib.sha256(normal.encode()).digest() if len(normal) >= MIN_UNIQUE_CHARS else None


def within(budget_bytes: int, texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        budget_bytes -= len(text.encode())
        if budget_bytes < 0:
            return
        yield text


def excerpt(held_out: list[str]) -> str:
    """Joins the beginnings of held-out documents that carry no copyright notice of their own, up to EXCERPT_BYTES."""
    parts: list[str] = []
    size = 0
    for text in held_out:
        if "copyright" in text.lower() or size >= EXCERPT_BYTES:
            continue
        part = text.encode()[: min(MAX_EXCERPT_DOCUMENT_BYTES, EXCERPT_BYTES - size)].decode(errors="ignore")
        part = part.rpartition("\n")[0].strip("\n") + "\n"
        size += len(part.encode())
        parts.append(part)
    return "\n".join(parts)


def fetch(package: str | None, cache: Path) -> tuple[Path, str]:
    """Downloads and unpacks one Debian package, once.

    Returns:
        Its root folder, and "package version".
    """
    if package is None:
        return Path(sysconfig.get_path("stdlib")), f"Python {platform.python_version()} standard library"
    root = cache / package
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=cache, check=True)
        subprocess.run(["dpkg-deb", "--extract", str(deb_of(package, cache)), str(root)], check=True)
    version = subprocess.run(
        ["dpkg-deb", "--field", str(deb_of(package, cache)), "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return root, f"{package} {version}"


def deb_of(package: str, cache: Path) -> Path:
    return next(iter(sorted(cache.glob(f"{package}_*.deb"))))


def read_python(root: Path) -> Documents:
    # Tests and code page tables are repetitive, lib2to3 and pydoc_data hold copies of other text.
    unwanted = {"test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "site-packages"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not unwanted & set(relative.parts):
            yield str(relative), path.read_text(encoding="utf-8", errors="replace")


def read_rest(root: Path) -> Documents:
    sources = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(sources.rglob("*.rst.txt")):
        if path.name != "changelog.rst.txt":
            yield str(path.relative_to(sources)), path.read_text(encoding="utf-8")


def read_german_help(root: Path) -> Documents:
    pages = root / "usr/share/libreoffice/help/de/text"
    for path in sorted(pages.rglob("*.html")):
        if "sbasic" not in path.parts:  # mostly program text in English
            parser = HelpPage()
            parser.feed(path.read_text(encoding="utf-8"))
            yield str(path.relative_to(pages)), "\n\n".join(parser.paragraphs) + "\n"


def read_jargon(root: Path) -> Documents:
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    paragraphs = re.sub(r"\n{3,}", "\n\n", text).split("\n\n")
    prose = [text for text in paragraphs if ":" in text or len(text.split()) > 3]  # drops the index of 2,300 headwords
    return blocks(prose, 40, "\n\n")


def read_unicode_table(root: Path) -> Documents:
    lines = (root / "usr/share/unicode/UnicodeData.txt").read_text(encoding="utf-8").splitlines()
    return blocks(lines, 64, "\n")


def blocks(units: list[str], size: int, separator: str) -> Documents:
    for start in range(0, len(units), size):
        yield str(start), separator.join(units[start : start + size]) + "\n"


class HelpPage(HTMLParser):
    """Collects the paragraphs of a LibreOffice help page's content area."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._inside = False
        self._words: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("id", "DisplayArea") in attrs:
            self._inside = True
        if self._inside and re.fullmatch(r"p|h[1-6]", tag):
            self._words = []

    def handle_endtag(self, tag: str) -> None:
        if self._words is not None and re.fullmatch(r"p|h[1-6]", tag):
            text = " ".join("".join(self._words).split())
            if text == "Help content debug info:":  # the page's footer begins
                self._inside = False
            elif text:
                self.paragraphs.append(text)
            self._words = None

    def handle_data(self, data: str) -> None:
        if self._words is not None:
            self._words.append(data)


DOMAINS = (
    Domain(
        name="code",
        what="Python program text",
        package=None,
        licence="PSF-2.0",
        read=read_python,
        separator="\n\n",
        sequences_per_batch=2,
    ),
    Domain(
        name="docs",
        what="technical documentation in English, reStructuredText",
        package="python3.11-doc",
        licence="PSF-2.0",
        read=read_rest,
        separator="\n\n",
        sequences_per_batch=2,
    ),
    Domain(
        name="german",
        what="help pages in German",
        package="libreoffice-help-de",
        licence="MPL-2.0",
        read=read_german_help,
        separator="\n\n",
        sequences_per_batch=1,
    ),
    Domain(
        name="jargon",
        what="English prose and a dictionary of slang, the Jargon File 4.4.7",
        package="jargon-text",
        licence="public domain",
        read=read_jargon,
        separator="\n\n",
        sequences_per_batch=1,
    ),
    Domain(
        name="table",
        what="semicolon-separated records, UnicodeData.txt",
        package="unicode-data",
        licence="Unicode-DFS-2016",
        read=read_unicode_table,
        separator="\n",
        sequences_per_batch=1,
    ),
)
