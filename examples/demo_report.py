"""What the demo model says of itself: `report.json`, its model card and the held-out excerpts with their sources."""

import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from demo_corpus import Corpus
from demo_measure import (
    EXCERPT_WINDOWS,
    HOT_EXPERTS,
    WINDOW_TOKENS,
    measure,
    rounded,
    skew_summary,
    unigram_nats,
    unigram_probabilities,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One domain in tokens."""

    corpus: Corpus
    train_T: Tensor
    held_out_T: Tensor
    excerpt_T: Tensor


def make_report(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, datasets: list[Dataset], training: Report
) -> Report:
    """Measures the model on every domain's held-out text."""
    config = model.config
    bytes_per_token_V = torch.tensor([num_bytes(tokenizer, token) for token in range(config.vocab_size)])
    mix = [(data.train_T, float(data.corpus.domain.sequences_per_batch)) for data in datasets]
    probability_V = unigram_probabilities(mix, config.vocab_size)
    domains, load_DLE = {}, {}
    for data in datasets:
        domain = data.corpus.domain
        held_out = measure(model, data.held_out_T, bytes_per_token_V)
        excerpt = measure(model, data.excerpt_T[: EXCERPT_WINDOWS * WINDOW_TOKENS], bytes_per_token_V)
        own_unigram_V = unigram_probabilities([(data.train_T, 1.0)], config.vocab_size)
        load_DLE[domain.name] = held_out.load_LE
        domains[domain.name] = {
            "what": domain.what,
            "source": data.corpus.source,
            "licence": domain.licence,
            "train_bytes": sum(len(text.encode()) for text in data.corpus.train),
            "train_tokens": len(data.train_T),
            "share_of_batch": domain.sequences_per_batch / sum(weight for _, weight in mix),
            "held_out_bytes": sum(len(text.encode()) for text in data.corpus.held_out),
            "held_out_tokens": held_out.num_tokens,
            "nats_per_token": round(held_out.nats_per_token, 4),
            "bits_per_byte": round(held_out.bits_per_byte, 4),
            "unigram_nats_per_token": round(unigram_nats(data.held_out_T, probability_V), 4),
            "own_unigram_nats_per_token": round(unigram_nats(data.held_out_T, own_unigram_V), 4),
            "excerpt": {
                "tokens": excerpt.num_tokens,
                "nats_per_token": round(excerpt.nats_per_token, 4),
                "unigram_nats_per_token": round(
                    unigram_nats(data.excerpt_T[: EXCERPT_WINDOWS * WINDOW_TOKENS], probability_V), 4
                ),
            },
        }
    batch_tokens = WINDOW_TOKENS * sum(data.corpus.domain.sequences_per_batch for data in datasets)
    return {
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "float32_bytes": sum(parameter.numel() * 4 for parameter in model.parameters()),
            "layers": config.num_hidden_layers,
            "experts": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "vocabulary": config.vocab_size,
        },
        "training": {
            **training,
            "tokens": int(training["steps"]) * batch_tokens,
            "tokens_per_step": batch_tokens,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "measured": {
            "window_tokens": WINDOW_TOKENS,
            "excerpt_windows": EXCERPT_WINDOWS,
            "unigram": "token frequencies of the train mix; own_unigram: of the domain's own train text",
        },
        "domains": domains,
        "skew": skew_summary(load_DLE),
        "load": {name: [rounded(load_E, 4) for load_E in load_LE] for name, load_LE in load_DLE.items()},
    }


def num_bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    """Bytes of text behind a token: byte-level BPE writes one character per byte, and special tokens stand for none."""
    return 0 if token in tokenizer.all_special_ids else len(str(tokenizer.convert_ids_to_tokens(token)))


def write_texts(folder: Path, corpora: list[Corpus]) -> None:
    """Writes each domain's held-out excerpt, and a README with where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in corpora:
        (folder / f"{corpus.domain.name}.txt").write_text(corpus.excerpt, encoding="utf-8")
    rows = [
        [f"`{c.domain.name}.txt`", c.domain.what, c.source, c.domain.licence, f"{len(c.excerpt.encode()):,}"]
        for c in corpora
    ]
    (folder / "README.md").write_text(TEXTS_README.format(table=table(TEXTS_HEAD, rows)), encoding="utf-8")


def write_report(folder: Path, report: Report) -> None:
    """Writes report.json, and README.md with the same numbers."""
    text = json.dumps(report, indent=1)
    one_line_lists = re.sub(r"\[[^\[\]]*\]", lambda match: " ".join(match.group().split()), text)
    (folder / "report.json").write_text(one_line_lists + "\n")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def model_card(report: Report) -> str:
    model, training, domains, skew = (report[key] for key in ("model", "training", "domains", "skew"))
    data_rows = [
        [name, d["what"], d["source"], d["licence"], f"{d['train_bytes']:,}", f"{d['held_out_bytes']:,}"]
        for name, d in domains.items()
    ]
    loss_rows = [
        [
            name,
            f"{d['nats_per_token']:.2f}",
            f"{d['unigram_nats_per_token']:.2f}",
            f"{d['unigram_nats_per_token'] - d['nats_per_token']:.2f}",
            f"{d['own_unigram_nats_per_token']:.2f}",
            f"{d['bits_per_byte']:.2f}",
        ]
        for name, d in domains.items()
    ]
    layers = [f"layer {layer}" for layer in range(model["layers"])]
    skew_rows = [[name, *hottest(skew, name)] for name in domains]
    skew_rows.append(["all, equally mixed", *(f"{value:.1f}" for value in skew["all_domains_hottest_over_mean"])])
    overlap_rows = [[pair, *(f"{value:.2f}" for value in row)] for pair, row in skew["load_overlap"].items()]
    gains = [d["unigram_nats_per_token"] - d["nats_per_token"] for d in domains.values()]
    peaks = [value for row in skew["hottest_over_mean"].values() for value in row]
    return MODEL_CARD.format(
        **model,
        **training,
        megabytes=model["float32_bytes"] / 1e6,
        million_parameters=model["parameters"] / 1e6,
        million_tokens=training["tokens"] / 1e6,
        minutes=training["wall_s"] / 60,
        num_domains=len(domains),
        min_gain=min(gains),
        max_gain=max(gains),
        min_peak=min(peaks),
        max_peak=max(peaks),
        hot=HOT_EXPERTS,
        data=table(["domain", "text", "source", "licence", "train bytes", "held-out bytes"], data_rows),
        loss=table(["domain", "nats/token", "unigram", "lower by", "own unigram", "bits/byte"], loss_rows),
        skew=table(["domain", *layers], skew_rows),
        overlap=table(["domains", *layers], overlap_rows),
    )


def hottest(skew: Report, name: str) -> list[str]:
    rows = zip(skew["hottest_over_mean"][name], skew["hot_sets"][name], strict=True)
    return [f"{peak:.1f} ({', '.join(map(str, hot))})" for peak, hot in rows]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXTS_HEAD = ["file", "text", "source", "licence", "bytes"]

TEXTS_README = """\
# Held-out excerpts

Text that the demo model has not seen, one file per domain, used as demo traffic and by the tests. Written by
`examples/train_demo_model.py`: beginnings of held-out documents that carry no copyright notice of their own, otherwise
unchanged (`german.txt` is the text of the HTML pages' paragraphs).

{table}

[LICENSES.md](LICENSES.md) has the licences and notices.
"""

MODEL_CARD = """\
# The expertmesh demo model

A small Mixture-of-Experts language model for demos, tests and measurements of routing. It is trained, so its routers
send real text to experts as unequally as large models do; it is far too small to say anything useful.

- **Size**: {million_parameters:.1f} M parameters, {megabytes:.1f} MB in float32; `{class}`, {layers} MoE layers of
  {experts} experts, top-{top_k}, own byte-level BPE of {vocabulary} tokens.
- **Data**: {num_domains} domains under free licences, {million_tokens:.1f} M tokens seen in {steps} steps and
  {minutes:.0f} minutes ({device}).
- **Loss**: {min_gain:.1f} to {max_gain:.1f} nats per token below a unigram model, on held-out text of every domain.
- **Routing skew**: the hottest expert of a layer gets {min_peak:.1f} to {max_peak:.1f} times the mean load, depending
  on domain and layer, and which experts are hot depends on the domain.

All numbers come from `report.json`, which the training script writes; `tests/test_demo_model.py` measures them again.

## Data and licence

{data}

Held-out text is split off by document, and no paragraph (for tables: line) of at least 60 characters occurs on both
sides; a line within a paragraph may.
The weights are released under the licence of this repository; the excerpts in `examples/texts` keep the licences above.

## Loss on held-out text

Windows of 256 tokens, no context across windows. *unigram*: token frequencies of the whole train mix; *own unigram*:
of the domain's own train text, a stronger opponent that already knows the domain.

{loss}

## Routing skew on held-out text

Load of the hottest expert over the mean load, and in brackets the {hot} hottest experts, hottest first.

{skew}

Common share of the load of two domains: 1 when they load all experts alike, 0 when they share none.

{overlap}

`report.json` has every expert's share of the load as `load[domain][layer][expert]`.

## Making it again

    apt-get update
    python examples/train_demo_model.py --out examples/demo_model --minutes {minutes:.0f} --threads 1 --seed {seed}

With `--steps {steps}` in place of `--minutes` the learning-rate schedule no longer depends on the machine's speed.
Trained with Python {python}, torch {torch} and transformers {transformers}.
"""
