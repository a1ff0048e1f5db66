"""The demo model as it is shipped: it loads without a network and is what its report says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO_MODEL = EXAMPLES / "demo_model"
MAX_BYTES = 20_000_000
LOSS_TOLERANCE = 0.01  # nats: float32 sums differ in order between machines, and a near tie can move a token's expert

REPORT: dict[str, Any] = json.loads((DEMO_MODEL / "report.json").read_text())
DOMAINS = sorted(REPORT["domains"])
NUM_LAYERS, NUM_EXPERTS = REPORT["model"]["layers"], REPORT["model"]["experts"]


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, Tensor]]:
    """Loss in nats per token, and each expert's share of the load [L, E], on the first windows of every excerpt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    window, num_windows = REPORT["measured"]["window_tokens"], REPORT["measured"]["excerpt_windows"]
    results = {}
    for domain in DOMAINS:
        text = (EXAMPLES / "texts" / f"{domain}.txt").read_text(encoding="utf-8")
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        batch = tokens[0, : window * num_windows].view(num_windows, window)
        with torch.no_grad():
            output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
        results[domain] = loss, torch.stack([load(logits_TE) for logits_TE in output.router_logits])
    return results


def load(router_logits_TE: Tensor) -> Tensor:
    expert_TK = router_logits_TE.topk(REPORT["model"]["top_k"]).indices
    return torch.bincount(expert_TK.flatten(), minlength=NUM_EXPERTS) / expert_TK.numel()


def test_directory_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= MAX_BYTES


def test_checkpoint_has_the_hub_layout_of_one_tensor_per_expert() -> None:
    with safe_open(DEMO_MODEL / "model.safetensors", framework="pt") as tensors:
        keys = set(tensors.keys())
    assert {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
        for name in ("gate", "up", "down")
    } <= keys


@pytest.mark.parametrize("domain", DOMAINS)
def test_loss_on_the_excerpt_is_what_the_report_says(domain: str, measured: dict[str, tuple[float, Tensor]]) -> None:
    assert measured[domain][0] == pytest.approx(
        REPORT["domains"][domain]["excerpt"]["nats_per_token"], abs=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("domain", DOMAINS)
def test_loss_is_well_below_that_of_a_unigram_model(domain: str, measured: dict[str, tuple[float, Tensor]]) -> None:
    assert measured[domain][0] < REPORT["domains"][domain]["excerpt"]["unigram_nats_per_token"] - 1.5


def test_every_expert_is_used(measured: dict[str, tuple[float, Tensor]]) -> None:
    mixed_LE = torch.stack([load_LE for _, load_LE in measured.values()]).mean(0)
    assert mixed_LE.min() > 0


def test_hot_experts_differ_between_domains(measured: dict[str, tuple[float, Tensor]]) -> None:
    for layer in range(NUM_LAYERS):
        hottest = {int(load_LE[layer].argmax()) for _, load_LE in measured.values()}
        assert len(hottest) > 1, f"every domain has the same hottest expert in layer {layer}"


def test_a_domain_loads_its_experts_unequally(measured: dict[str, tuple[float, Tensor]]) -> None:
    peaks = torch.stack([load_LE.amax(1) * NUM_EXPERTS for _, load_LE in measured.values()])
    assert peaks.mean() >= 2.0
