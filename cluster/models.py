"""From what a person calls a model to a directory: a path, or a hub id that is downloaded where there is a network."""

import re
from pathlib import Path

from protos.errors import UnsupportedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(name: str) -> Path:
    """The model's directory.

    Args:
        name: a directory, or a hub id such as "Qwen/Qwen3-30B-A3B".

    Raises:
        UnsupportedModel: neither a directory nor a model that the hub delivers.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise UnsupportedModel(f"model {name!r} is a file (expected a directory with config.json and *.safetensors)")
    if not _HUB_ID.fullmatch(name):
        raise UnsupportedModel(f"model {name!r}: no such directory")
    import huggingface_hub  # slow to import, and most models are directories

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        raise UnsupportedModel(f"model {name!r}: no such directory, and the hub does not deliver it: {reason}") from err
