"""Generate the Python code of the .proto files, or check that what is committed is up to date.

`python -m protos.generate` writes `*_pb2.py` and `*_pb2.pyi` beside the sources; `--check` writes nothing and exits 1
if a committed file differs. Services have no generated stubs: `protos/services.py` defines their methods with our own
serialisers, which do not copy tensors.
"""

import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent


def generate(target: Path) -> None:
    """Run protoc for every .proto file of this package, writing under `target`/protos."""
    import grpc_tools
    from grpc_tools import protoc

    includes = [f"-I{PACKAGE.parent}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    sources = [f"protos/{path.name}" for path in sorted(PACKAGE.glob("*.proto"))]
    status = protoc.main(["protoc", *includes, f"--python_out={target}", f"--pyi_out={target}", *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        generate(PACKAGE.parent)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name: path.read_text() for path in (Path(folder) / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in PACKAGE.glob("*_pb2.py*")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        print(f"out of date: {', '.join(stale)}; run `make protos`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
