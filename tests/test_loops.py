"""A process that serves or measures: what stays is out of the garbage collector's way."""

import json
import subprocess
import sys

_FROZEN = """
import gc, json
import torch
from protos.loops import freeze_garbage_collector

class Node: pass

def cycle():
    one, other = Node(), Node()
    one.other, other.other = other, one

cycle()
before = len(gc.get_objects())
freeze_garbage_collector()
looked_at = len(gc.get_objects())
nodes = sum(isinstance(each, Node) for each in gc.get_objects(generation=None))
gc.disable()
cycle()
freed = gc.collect()
print(json.dumps({"before": before, "looked_at": looked_at, "nodes": nodes, "freed": freed}))
"""


def test_a_frozen_process_collects_what_is_new_and_looks_at_little_else() -> None:
    found = json.loads(
        subprocess.run([sys.executable, "-c", _FROZEN], capture_output=True, text=True, check=True).stdout
    )
    assert found["before"] > 50_000  # torch
    assert found["looked_at"] < found["before"] / 50
    assert found["nodes"] == 0  # what was garbage is gone, not frozen
    assert found["freed"] >= 2
