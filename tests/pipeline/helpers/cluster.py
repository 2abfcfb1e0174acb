"""A Ray cluster of several nodes on this machine, in a process of its own, with a token."""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType


class RayCluster:
    """Starts when entered; `kill_node` kills a raylet that is not the head, and adds another."""

    def __init__(self, nodes: int, cpus: int = 1, gpus: int = 0) -> None:
        self.arguments = [str(nodes), str(cpus), str(gpus)]

    def __enter__(self) -> RayCluster:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.helpers.cluster", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
        self.address = self._answer()
        return self

    def kill_node(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        self._answer()

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("cluster: "):
                return line.removeprefix("cluster: ").strip()
        raise RuntimeError("the cluster did not start")


def main() -> None:
    """`python -m … NODES CPUS GPUS`, told what to do by standard input."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled()
    nodes, cpus, gpus = map(int, sys.argv[1:])
    head = {"num_cpus": cpus, "num_gpus": gpus}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(num_cpus=cpus, num_gpus=gpus) for _ in range(nodes - 1)]
    print(f"cluster: {cluster.address}", flush=True)
    try:
        for _ in sys.stdin:
            cluster.remove_node(others.pop(0), allow_graceful=False)
            others.append(cluster.add_node(num_cpus=cpus, num_gpus=gpus))
            print("cluster: killed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
