"""Loading costs what it keeps: peak memory and bytes read, measured in a process of its own."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.weights import ExpertShard
from protos.checkpoint import Checkpoint, read_model
from tests.tiny_models import tiny_model

LAYERS, EXPERTS, DIM, HIDDEN = 4, 8, 1024, 1024
MIB = 1 << 20

# Loads everything; prints how far memory rose at its highest, what is kept, what was read, one expert's bytes on disk.
_PROGRAM = """
import json, sys
import torch
from pathlib import Path
from experts.weights import ExpertShard
from protos.checkpoint import Checkpoint, read_model
from protos.loops import keep_freed_memory

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

path, dtype, weight_dtype = sys.argv[1:]
torch.set_num_threads(1)
keep_freed_memory()  # as expert servers do
spec = read_model(Path(path))
first, shard = (
    ExpertShard(spec, Checkpoint(spec), torch.device("cpu"), getattr(torch, dtype), 1 << 40, weight_dtype or None)
    for _ in range(2)
)
first.load([(spec.layers[0], 0)])  # code, and what torch sets up on first use
first.held = {}
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
shard.load([(layer, expert) for layer in spec.layers for expert in range(spec.num_experts)])
peak = status("VmHWM") - before
parts = [part for copy in shard.held.values() for part in (copy.up, copy.down, copy.up_bias, copy.down_bias)]
kept = sum(part.nbytes for part in parts if part is not None)
source = shard.checkpoint.expert_bytes(spec.layers[0], 0)
print(json.dumps({"peak": peak, "kept": kept, "read": shard.checkpoint.bytes_read, "expert": source}))
"""


def _plain(dtype: torch.dtype) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda rows, columns: {"weight": (torch.randn(rows, columns) * 0.02).to(dtype)}


def _fp8(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight": torch.randint(0, 0x70, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5,
    }


def _per_expert(path: Path, layers: int, make: Callable[[int, int], dict[str, Tensor]], **config: object) -> Path:
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = torch.randn(EXPERTS, DIM).bfloat16()
        for expert in range(EXPERTS):
            for name, rows, columns in (("gate", HIDDEN, DIM), ("up", HIDDEN, DIM), ("down", DIM, HIDDEN)):
                for piece, tensor in make(rows, columns).items():
                    tensors[f"{block}.experts.{expert}.{name}_proj.{piece}"] = tensor
    return _write(
        path,
        tensors,
        model_type="qwen3_moe",
        moe_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_hidden_layers=layers,
        norm_topk_prob=True,
        **config,
    )


def _transposed(path: Path, layers: int) -> Path:
    """gpt-oss: stacks of (in, out) with gate and up in alternating columns, and biases."""
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        for name, *shape in (
            ("router.weight", EXPERTS, DIM),
            ("router.bias", EXPERTS),
            ("experts.gate_up_proj", EXPERTS, DIM, 2 * HIDDEN),
            ("experts.gate_up_proj_bias", EXPERTS, 2 * HIDDEN),
            ("experts.down_proj", EXPERTS, HIDDEN, DIM),
            ("experts.down_proj_bias", EXPERTS, DIM),
        ):
            tensors[f"{block}.{name}"] = torch.randn(*shape).bfloat16()
    return _write(
        path,
        tensors,
        model_type="gpt_oss",
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_hidden_layers=layers,
    )


def _write(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    common = {"hidden_size": DIM, "num_experts_per_tok": 2, "hidden_act": "silu"}
    (path / "config.json").write_text(json.dumps(common | config))
    return path


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_CASES: dict[str, Callable[[Path], Path]] = {
    "bfloat16": lambda path: _per_expert(path, LAYERS, _plain(torch.bfloat16)),
    "float32": lambda path: _per_expert(path, LAYERS, _plain(torch.float32)),
    "stacked and transposed": lambda path: _transposed(path, LAYERS),
    "fp8": lambda path: _per_expert(path, LAYERS, _fp8, quantization_config=_FP8),
}


def _load(path: Path, dtype: str, weight_dtype: str = "") -> dict[str, int]:
    command = [sys.executable, "-c", _PROGRAM, str(path), dtype, weight_dtype]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    measured: dict[str, int] = json.loads(output)
    return measured


@pytest.mark.parametrize("weight_dtype", ["", "int8"], ids=["as they are", "packed as int8"])
@pytest.mark.parametrize("name", _CASES)
def test_loading_all_experts_takes_little_more_memory_than_they_keep(
    name: str, weight_dtype: str, tmp_path: Path
) -> None:
    dtype = "float32" if name == "float32" else "bfloat16"
    measured = _load(_CASES[name](tmp_path / "model"), dtype, weight_dtype)
    assert measured["kept"] > 90 * MIB
    assert measured["read"] == EXPERTS * LAYERS * measured["expert"]
    source = measured["expert"] if weight_dtype else 0  # packing needs all of an expert beside what becomes of it
    assert measured["peak"] <= 1.3 * measured["kept"] + source, measured


def test_a_long_load_shows_a_bar_at_a_terminal_and_a_log_stays_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def __init__(self, *, is_terminal: bool) -> None:
            super().__init__()
            self._is_terminal = is_terminal

        def isatty(self) -> bool:
            return self._is_terminal

    monkeypatch.setattr("experts.weights.BAR_AFTER_S", 0.0)
    spec = read_model(tiny_model("mixtral", tmp_path))
    shown = {}
    for is_terminal in (True, False):
        screen = Terminal(is_terminal=is_terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        shard = ExpertShard(spec, Checkpoint(spec), torch.device("cpu"), torch.float32, 1 << 40)
        shard.load([(layer, expert) for layer in spec.layers for expert in range(spec.num_experts)])
        shown[is_terminal] = screen.getvalue()
    assert "experts" in shown[True]
    assert "/24" in shown[True]
    assert not shown[False]
