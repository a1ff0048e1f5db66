"""`python -m router MODEL --server HOST:PORT ...`: one router without Ray, over expert servers started by hand.

Asks each server what it holds and uses that as a fixed placement. Prints one JSON line {"address", "pid"} when it
serves; ends on SIGTERM, SIGINT or when its standard input closes. For benchmarks and for machines without Ray.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import grpc

from protos import expert_pb2
from protos.checkpoint import read_model
from protos.errors import ExpertmeshError, Unavailable
from protos.loops import freeze_garbage_collector, wait_for_end
from protos.services import EXPERT_SERVICE
from router.config import RouterConfig
from router.service import RouterServer
from router.table import CopyShare, PlacementTable, ServerAddress


def fixed_table(addresses: list[str], *, num_experts: int) -> PlacementTable:
    """The placement that the servers at these addresses hold now, every copy with an equal share.

    Raises:
        Unavailable: a server does not answer.
    """
    servers: list[ServerAddress] = []
    copies: dict[tuple[str, int], list[str]] = {}
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            status = channel.unary_unary(
                f"/{EXPERT_SERVICE}/Status",
                request_serializer=expert_pb2.StatusRequest.SerializeToString,
                response_deserializer=expert_pb2.StatusResponse.FromString,
            )
            try:
                held: expert_pb2.StatusResponse = status(expert_pb2.StatusRequest(), timeout=10)
            except grpc.RpcError as err:
                raise Unavailable(f"no expert server answers at {address}") from err
        servers.append(ServerAddress(server_id=held.server_id, address=address))
        for copy in held.copies:
            copies.setdefault((copy.layer, copy.expert), []).append(held.server_id)
    return PlacementTable(
        epoch=1,
        servers=tuple(servers),
        copies={key: tuple(CopyShare(server_id=name, share=1.0) for name in held) for key, held in copies.items()},
        num_experts=num_experts,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--server", action="append", required=True, help="host:port of an expert server; repeat")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--config", default="{}", help="RouterConfig as JSON")
    args = parser.parse_args()
    try:
        spec = read_model(args.model)
        router = RouterServer(spec, RouterConfig.model_validate_json(args.config))
        table = fixed_table(args.server, num_experts=spec.num_experts)
        address = router.start(args.host, args.port)
    except (ExpertmeshError, ValueError) as err:
        print(err, file=sys.stderr)
        return 2
    router.update(table)
    freeze_garbage_collector()
    print(json.dumps({"address": address, "pid": os.getpid()}), flush=True)
    wait_for_end()
    router.stop(grace_s=5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
