"""Arrays as files: safetensors in, with errors that name file and key; safetensors out, whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from protos.codec import WIRE_DTYPES
from protos.errors import InvalidRequest


def read_states(path: Path, key: str, *, dim: int) -> Tensor:
    """The hidden states [T, D] stored under `key`.

    Raises:
        InvalidRequest: no such file or key, or another dtype or shape, or a NaN or inf; names the file and the value.
    """
    x_TD = _read(path, (key,))[key]
    check_states(x_TD, name=f"{path}: {key}", dim=dim)
    return x_TD


def read_token_ids(path: Path, num_tokens: int) -> npt.NDArray[np.int64]:
    """The token ids [T] stored under `token_ids`.

    Raises:
        InvalidRequest: no such key, no integers, or not one per token.
    """
    ids_T = _read(path, ("token_ids",))["token_ids"]
    if ids_T.dtype not in (torch.int64, torch.int32) or ids_T.shape != (num_tokens,):
        raise InvalidRequest(
            f"{path}: token_ids has dtype {ids_T.dtype} and shape {list(ids_T.shape)}, expected int64 [{num_tokens}]"
        )
    found_T: npt.NDArray[np.int64] = ids_T.to(torch.int64).numpy()
    return found_T


def read_trace(path: Path, layers: tuple[str, ...], *, dim: int) -> dict[str, Tensor]:
    """Recorded hidden states [N, D] by layer name, from keys `layer.<name>`; raises as `read_states`.

    Layers without a key are left out; other keys are not read.
    """
    wanted = {f"layer.{layer}": layer for layer in layers}
    found = _read(path, tuple(wanted), needed=False)
    if not found:
        raise InvalidRequest(f"{path}: no key of {', '.join(wanted)}")
    for key, x_ND in found.items():
        check_states(x_ND, name=f"{path}: {key}", dim=dim)
    return {wanted[key]: x_ND for key, x_ND in found.items()}


def check_states(x_TD: Tensor, *, name: str, dim: int) -> None:
    """Raise InvalidRequest unless x_TD is [T >= 1, dim], of a dtype that travels, and finite."""
    if x_TD.dtype not in WIRE_DTYPES:
        raise InvalidRequest(f"{name} has dtype {x_TD.dtype} (supported: float32, bfloat16, float16)")
    if x_TD.dim() != 2 or x_TD.shape[1] != dim or x_TD.shape[0] < 1:
        raise InvalidRequest(f"{name} has shape {list(x_TD.shape)}, expected [T, {dim}] with T >= 1")
    finite_T = torch.isfinite(x_TD).all(dim=1)
    if not finite_T.all():
        row = int((~finite_T).nonzero()[0])
        raise InvalidRequest(f"{name} has a NaN or inf in row {row} (of 0..{x_TD.shape[0] - 1})")


def writable(path: Path) -> Path:
    """`path`, if a file can be written there; found out before the work, not after it.

    Raises:
        InvalidRequest: its directory is missing or not writable, or it is a directory.
    """
    if path.is_dir():
        raise InvalidRequest(f"{path}: is a directory, a file is needed")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path}: no such directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequest(f"{path}: directory {path.parent} is not writable")
    return path


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: array.contiguous() for name, array in arrays.items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, keys: tuple[str, ...], *, needed: bool = True) -> dict[str, Tensor]:
    if not path.is_file():
        raise InvalidRequest(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            if needed and (missing := [key for key in keys if key not in held]):
                raise InvalidRequest(f"{path}: no key {missing[0]!r} (it has {', '.join(sorted(held)) or 'none'})")
            return {key: file.get_tensor(key) for key in keys if key in held}
    except (SafetensorError, OSError) as err:
        raise InvalidRequest(f"{path}: not a readable safetensors file ({err})") from err
