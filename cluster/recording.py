"""Real traffic for a MoE layer: the hidden states that reach each MoE block when the model reads a text."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.reference import Reference, load_reference
from protos.errors import InvalidRequest
from protos.model import ModelSpec

WINDOW_TOKENS = 256
WINDOWS_PER_BATCH = 8


def record_states(spec: ModelSpec, texts: Mapping[str, Path], *, max_tokens: int) -> dict[str, dict[str, Tensor]]:
    """Read texts with the whole model on the CPU and keep what its MoE blocks receive.

    Args:
        texts: domain to text file.
        max_tokens: of each text, rounded down to whole windows.

    Returns:
        domain to layer to x_ND, N tokens in reading order.

    Raises:
        InvalidRequest: a text cannot be read or is shorter than a window.
        UnsupportedModel: transformers cannot load the model.
    """
    reference = load_reference(spec)
    from transformers import AutoTokenizer  # slow to import; load_reference has paid for it

    tokenizer = AutoTokenizer.from_pretrained(spec.path, local_files_only=True)
    recorded = {}
    for domain, path in texts.items():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as err:
            raise InvalidRequest(f"{path}: cannot be read ({err.strerror})") from err
        tokens_N = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        num_windows = min(len(tokens_N), max_tokens) // WINDOW_TOKENS
        if not num_windows:
            raise InvalidRequest(f"{path}: {len(tokens_N)} tokens, at least {WINDOW_TOKENS} are needed")
        recorded[domain] = _read(reference, spec, tokens_N[: num_windows * WINDOW_TOKENS].view(num_windows, -1))
    return recorded


@torch.inference_mode()
def _read(reference: Reference, spec: ModelSpec, tokens_WN: Tensor) -> dict[str, Tensor]:
    """What each MoE block receives, W windows of N tokens after each other."""
    caught: dict[str, list[Tensor]] = {layer: [] for layer in spec.layers}
    hooks = []
    for layer in spec.layers:

        def catch(block: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor] = caught[layer]) -> None:
            kept.append(args[0].reshape(-1, spec.dim).clone())

        hooks.append(reference.block(layer).register_forward_pre_hook(catch))
    try:
        for batch_BN in torch.split(tokens_WN, WINDOWS_PER_BATCH):
            reference.model.get_submodule("model")(input_ids=batch_BN, use_cache=False)  # without the head: no logits
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in caught.items()}
