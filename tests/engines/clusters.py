"""A Ray cluster of several nodes on loopback, for tests; it starts on a loaded machine too."""

import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 100_000_000,
    "include_dashboard": False,
    "include_log_monitor": False,
}
HEAD: dict[str, Any] = {
    "no_monitor": True,
    "_system_config": {  # a node that was killed is known to be dead at once, one that is slow never
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 100,
        "health_check_failure_threshold": 3,
        "health_check_timeout_ms": 600_000,
    },
}


@contextmanager
def cluster(n_nodes: int) -> Iterator[Any]:
    """Nodes of one core each."""
    from ray._private import services
    from ray._raylet import persist_port
    from ray.cluster_utils import Cluster

    start = services.start_raylet

    def start_without_waiting(*args: Any, **options: Any) -> Any:
        """A raylet waits 20 seconds for the ports of its agents; a loaded machine needs longer to start them."""
        bound = inspect.signature(start).bind(*args, **options)
        node = bound.arguments["session_dir"], bound.arguments["node_id"]
        for name in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"):
            persist_port(*node, name, -1)  # not in use
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        bound.arguments["runtime_env_agent_port"] = port
        persist_port(*node, "runtime_env_agent_port", port)
        return start(*bound.args, **bound.kwargs)

    services.start_raylet = start_without_waiting
    try:
        nodes = Cluster(initialize_head=True, head_node_args=OPTIONS | HEAD)
        try:
            for _ in range(n_nodes - 1):
                nodes.add_node(**OPTIONS)
            yield nodes
        finally:
            nodes.shutdown()
    finally:
        services.start_raylet = start


def node_of(nodes: Any, pid: int) -> Any:
    """The node whose raylet started a worker; None for the head."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return next((node for node in nodes.worker_nodes if raylet_of(node).pid == parent), None)


def raylet_of(node: Any) -> Any:
    """The process of a node that starts its workers, which end with it."""
    return node.all_processes["raylet"][0].process


def kill_node(nodes: Any, node: Any) -> None:
    """Kill a node, as when its machine fails."""
    raylet_of(node).kill()
    nodes.remove_node(node, allow_graceful=False)
