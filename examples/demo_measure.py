"""What the demo model is worth on held-out text: its loss beside a unigram model's, and where its routers send tokens.

T tokens, L layers, E experts, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM

WINDOW_TOKENS = 256  # the length the model was trained on; no context crosses a window
EXCERPT_WINDOWS = 16  # of each committed excerpt; the tests measure the same ones again
HOT_EXPERTS = 4  # how many experts make up a domain's "hot set" in one layer
WINDOWS_PER_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Loss and routing over one text."""

    num_tokens: int  # predicted ones: the first of each window has no context
    nats_per_token: float
    bits_per_byte: float
    load_LE: Tensor  # share of routed pairs; each row sums to 1


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, tokens_T: Tensor, bytes_per_token_V: Tensor) -> Measurement:
    """Runs the model over whole windows of a text.

    Args:
        tokens_T: the text; what does not fill a last window is left out.
        bytes_per_token_V: how many bytes of text each token stands for.
    """
    device = model.device
    nats, num_bytes, num_tokens = 0.0, 0, 0
    pairs_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for batch in torch.split(windows_of(tokens_T), WINDOWS_PER_BATCH):
        output = model(input_ids=batch.to(device), use_cache=False, output_router_logits=True)
        targets = batch[:, 1:]
        logits = output.logits[:, :-1].float()
        nats += functional.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), reduction="sum").item()
        num_bytes += int(bytes_per_token_V[targets].sum())
        num_tokens += targets.numel()
        for layer, router_logits_TE in enumerate(output.router_logits):
            expert_TK = router_logits_TE.topk(model.config.num_experts_per_tok).indices
            pairs_LE[layer] += torch.bincount(expert_TK.flatten().cpu(), minlength=model.config.num_experts)
    return Measurement(
        num_tokens=num_tokens,
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        load_LE=pairs_LE / pairs_LE.sum(dim=1, keepdim=True),
    )


def windows_of(tokens_T: Tensor) -> Tensor:
    num_windows = len(tokens_T) // WINDOW_TOKENS
    return tokens_T[: num_windows * WINDOW_TOKENS].view(num_windows, WINDOW_TOKENS)


def unigram_probabilities(train: list[tuple[Tensor, float]], vocab_size: int) -> Tensor:
    """The best model without context: token frequencies of the weighted train mix, one count added to each token.

    Args:
        train: (tokens, weight in the mix) per domain.
    """
    mix_V = sum(
        (weight * torch.bincount(tokens, minlength=vocab_size) / len(tokens) for tokens, weight in train),
        torch.zeros(vocab_size),
    )
    counts_V = mix_V / mix_V.sum() * sum(len(tokens) for tokens, _ in train) + 1
    return counts_V / counts_V.sum()


def unigram_nats(tokens_T: Tensor, probability_V: Tensor) -> float:
    """Loss of the unigram model on the tokens that `measure` asks the model to predict."""
    return -probability_V.log()[windows_of(tokens_T)[:, 1:]].mean().item()


def skew_summary(load_DLE: dict[str, Tensor]) -> dict[str, object]:
    """How unequal the load of experts is within each domain, and how alike it is between domains.

    Returns:
        `hottest_over_mean` [domain][layer]: load of the hottest expert over the mean load; `hot_sets`
        [domain][layer]: the HOT_EXPERTS hottest; `hot_set_overlap` [pair][layer]: common share of two hot sets;
        `load_overlap` [pair][layer]: common share of two loads, 1 for equal ones and 0 for disjoint ones;
        `all_domains_hottest_over_mean` [layer]: the same skew when every domain sends equally much.
    """
    names = sorted(load_DLE)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    num_experts = next(iter(load_DLE.values())).shape[1]
    hot = {name: load_LE.topk(HOT_EXPERTS).indices.tolist() for name, load_LE in load_DLE.items()}
    mixed_LE = torch.stack(list(load_DLE.values())).mean(0)
    return {
        "hot_experts": HOT_EXPERTS,
        "hottest_over_mean": {name: rounded(load_DLE[name].amax(1) * num_experts, 2) for name in names},
        "all_domains_hottest_over_mean": rounded(mixed_LE.amax(1) * num_experts, 2),
        "hot_sets": {name: hot[name] for name in names},
        "hot_set_overlap": {
            f"{a}/{b}": [len(set(x) & set(y)) / HOT_EXPERTS for x, y in zip(hot[a], hot[b], strict=True)]
            for a, b in pairs
        },
        "load_overlap": {f"{a}/{b}": rounded(torch.minimum(load_DLE[a], load_DLE[b]).sum(1), 3) for a, b in pairs},
    }


def rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
