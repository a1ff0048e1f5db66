"""`python -m experts MODEL --copies 3:0-7,4:1`: one expert server without Ray, for benchmarks and GPU machines.

Prints one JSON line {"server_id", "address", "pid", "copies"} when it serves; ends on SIGTERM, SIGINT or when its
standard input closes.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from experts.config import ExpertServerConfig
from experts.service import ExpertServer
from protos.checkpoint import Checkpoint
from protos.errors import ExpertmeshError, InvalidRequest
from protos.loops import freeze_garbage_collector, wait_for_end
from protos.model import ModelSpec


def parse_copies(text: str, spec: ModelSpec) -> list[tuple[str, int]]:
    """ "3:0-7,4:1" -> [("3", 0), ..., ("4", 1)]; "all" is every expert of every layer; "*:0-3" of every layer."""
    if text == "all":
        text = f"*:0-{spec.num_experts - 1}"
    copies = []
    for part in text.split(","):
        layer, _, experts = part.rpartition(":")
        first, _, last = experts.partition("-")
        if not layer or not first.isdigit() or not (last or first).isdigit():
            raise InvalidRequest(f"copies {part!r} is not of the form LAYER:FIRST-LAST, LAYER:EXPERT or 'all'")
        for name in spec.layers if layer == "*" else (layer,):
            copies += [(name, expert) for expert in range(int(first), int(last or first) + 1)]
    return copies


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experts", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--copies", default="all", help='for example "3:0-7,4:1", "*:0-3" or "all"')
    parser.add_argument("--server-id", default=f"server-{os.getpid()}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--config", default="{}", help="ExpertServerConfig as JSON")
    args = parser.parse_args()
    try:
        checkpoint = Checkpoint.open(args.model)
        spec = checkpoint.spec
        config = ExpertServerConfig.model_validate_json(args.config)
        server = ExpertServer(spec, config, server_id=args.server_id, checkpoint=checkpoint)
        copies = parse_copies(args.copies, spec)
        server.load(copies)
        address = server.start(args.host, args.port)
    except (ExpertmeshError, ValueError) as err:
        print(err, file=sys.stderr)
        return 2
    freeze_garbage_collector()
    print(json.dumps({"server_id": server.server_id, "address": address, "pid": os.getpid(), "copies": len(copies)}))
    sys.stdout.flush()
    wait_for_end()
    server.stop(grace_s=5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
