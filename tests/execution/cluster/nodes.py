"""A Ray cluster of several machines on this one, in a process of its own: `python nodes.py`.

A line of JSON on standard input is an order, and a line of JSON on standard output the answer: `{"cpus": 1, "env": {}}`
adds a machine, `{"kill": N}` ends machine N with SIGKILL, its workers and all, `{"kill_head": true}` the head's server.
The cluster ends with standard input. Ray's own `ray.cluster_utils.Cluster` starts the same processes as `ray start`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): what its parent leaves behind becomes a child of this process

MEMORY = 80 << 20
"""Bytes of Ray's store of objects of each machine, the least that it takes."""


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        below.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for at in found:
        found += below.get(at, [])
    return found


def kill(pids: list[int]) -> None:
    """End processes at once."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def main() -> None:
    """Obey until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    from ray.cluster_utils import Cluster

    usual = {"object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **usual})
    nodes: list[Any] = [cluster.head_node]

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    def pid_of(node: Any, kind: str) -> int:
        return int(node.all_processes[kind][0].process.pid)

    say({"address": cluster.address})
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "cpus" in order:
                more = {"env_vars": order["env"]} if order.get("env") else {}
                nodes.append(cluster.add_node(num_cpus=order["cpus"], object_store_memory=MEMORY, **more))
                say({"raylet": pid_of(nodes[-1], "raylet"), "node": nodes[-1].node_id})
            elif "kill" in order:
                kill(descendants(pid_of(nodes[order["kill"]], "raylet")))
                say({})
            elif "kill_head" in order:
                kill([pid_of(nodes[0], "gcs_server")])
                say({})
    finally:
        kill(sorted(set(descendants(os.getpid())) - {os.getpid()}))  # Ray's own way to end takes many seconds


if __name__ == "__main__":
    main()
