"""A Ray cluster of several nodes on loopback, for tests; it starts on a loaded machine too."""

import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OPTIONS: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 100_000_000,
    "include_dashboard": False,
    "include_log_monitor": False,
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
        nodes = Cluster(initialize_head=True, head_node_args=OPTIONS)
        try:
            for _ in range(n_nodes - 1):
                nodes.add_node(**OPTIONS)
            yield nodes
        finally:
            nodes.shutdown()
    finally:
        services.start_raylet = start
