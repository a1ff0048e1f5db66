"""Trains the small Mixture-of-Experts model that ships with expertmesh, and measures it on held-out text.

    python examples/train_demo_model.py --out examples/demo_model --minutes 50

The data order and the initial weights follow from --seed; with --steps instead of --minutes the schedule does too.
Needs apt-get (Debian) to fetch the texts, no root and no GPU.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import Corpus, load_corpora
from demo_measure import WINDOW_TOKENS
from demo_report import Dataset, make_report, write_report, write_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_BYTES_PER_DOMAIN = 1_500_000  # equal shares, so that no domain is spelled in letters

PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 1e-4
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
# Enough to keep every expert in use over the mix of domains, too little to stop a domain from having its own experts.
BALANCE_COEFFICIENT = 0.01

CHECKPOINT_EVERY_S = 900.0
LOG_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When training ends: after a number of steps if given, else after a time."""

    minutes: float
    steps: int | None

    def progress(self, *, step: int, elapsed_s: float) -> float:
        """How much of the budget is used, from 0 to 1."""
        used = elapsed_s / (60 * self.minutes) if self.steps is None else step / self.steps
        return min(used, 1.0)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")

    corpora = load_corpora(args.cache)
    tokenizer = train_tokenizer(corpora)
    datasets = [tokenize(corpus, tokenizer) for corpus in corpora]
    for data in datasets:
        print(f"{data.corpus.domain.name}: {len(data.train_T)} train, {len(data.held_out_T)} held-out tokens")
    model = new_model(tokenizer.eos_token_id)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the signature

    def save(steps: int, wall_s: float) -> None:
        training = {"seed": args.seed, "steps": steps, "wall_s": round(wall_s), "device": device}
        write_checkpoint(args.out, args.texts or args.out.parent / "texts", model, tokenizer, datasets, training)

    steps, wall_s = train(model, datasets, Budget(minutes=args.minutes, steps=args.steps), args.seed, save)
    save(steps, wall_s)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--texts", type=Path, help="folder of the held-out excerpts (default: texts, beside --out)")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/expertmesh-demo", help="downloaded packages"
    )
    parser.add_argument("--minutes", type=float, default=50.0, help="training time")
    parser.add_argument("--steps", type=int, help="end after this many steps instead, for an exact repetition")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return parser.parse_args()


def train_tokenizer(corpora: list[Corpus]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the train texts: no input is unknown to it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(("".join(corpus.train)[:TOKENIZER_BYTES_PER_DOMAIN] for corpus in corpora), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    def tokens(texts: list[str]) -> Tensor:
        rows = tokenizer(texts, verbose=False)["input_ids"]
        return torch.tensor([token for row in rows for token in [tokenizer.eos_token_id, *row]])

    return Dataset(
        corpus=corpus,
        train_T=tokens(corpus.train),
        held_out_T=tokens(corpus.held_out),
        excerpt_T=torch.tensor(tokenizer(corpus.excerpt, verbose=False)["input_ids"]),
    )


def new_model(end_of_text: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]  # read by the model, written to config.json, not declared by the class
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=128,  # of dense layers, which there are none of
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # on two CPU cores 1.2 times as fast as the loop over experts
    return model


def train(
    model: Qwen3MoeForCausalLM,
    datasets: list[Dataset],
    budget: Budget,
    seed: int,
    save: Callable[[int, float], None],
) -> tuple[int, float]:
    """Trains in place and calls `save(steps, wall_s)` now and then.

    Returns:
        Steps done and seconds of training, without those of saving.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    rng = random.Random(seed)
    step, elapsed_s, next_save_s = 0, 0.0, CHECKPOINT_EVERY_S
    while (progress := budget.progress(step=step, elapsed_s=elapsed_s)) < 1.0:
        started_s = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        batch = next_batch(datasets, rng).to(model.device)
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        text_loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (text_loss + BALANCE_COEFFICIENT * balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        elapsed_s += time.monotonic() - started_s
        if step % LOG_EVERY_STEPS == 0:
            print(
                f"{step:6d} {elapsed_s:6.0f} s  loss {text_loss.item():.3f}  balance {balance.item():.3f}", flush=True
            )
        if elapsed_s > next_save_s:
            save(step, elapsed_s)
            next_save_s += CHECKPOINT_EVERY_S
    return step, elapsed_s


def parameter_groups(model: Qwen3MoeForCausalLM) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then half a cosine down to FINAL_LEARNING_RATE."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decayed = FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * cosine
    return decayed * min(1.0, (step + 1) / WARMUP_STEPS)


def next_batch(datasets: list[Dataset], rng: random.Random) -> Tensor:
    """Random windows, the same number of each domain in every batch, so that balance is asked of the mix only."""
    rows = []
    for data in datasets:
        for _ in range(data.corpus.domain.sequences_per_batch):
            start = rng.randrange(len(data.train_T) - WINDOW_TOKENS)
            rows.append(data.train_T[start : start + WINDOW_TOKENS])
    return torch.stack(rows)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4), 1 when all experts get equally much.

    transformers' own adds up the layers before it compares experts, which lets one layer starve an expert that
    another one overloads; here every layer is balanced by itself.
    """
    losses = []
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[-1]
        probability_TE = logits_TE.softmax(-1)
        chosen = probability_TE.topk(top_k).indices.flatten()
        share_E = torch.bincount(chosen, minlength=num_experts) / len(chosen)
        losses.append(num_experts * (share_E * probability_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def write_checkpoint(
    out: Path,
    texts: Path,
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    datasets: list[Dataset],
    training: dict[str, object],
) -> None:
    """Writes model, tokenizer, excerpts, report and model card."""
    model.train(False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = make_report(model, tokenizer, datasets, training)
    write_report(out, report)
    write_texts(texts, [data.corpus for data in datasets])
    model.train()


if __name__ == "__main__":
    main()
