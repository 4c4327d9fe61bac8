"""Start SGLang workers and their router as programs of the serve environment, probe, supervise and stop them.

Imports neither sglang nor torch: the build environment runs this, the serve environment's Python what it starts.
"""

from pdtrim_deploy.serving.cluster import Cluster
from pdtrim_deploy.serving.engines import EXECUTORS, Engine, Executors
from pdtrim_deploy.serving.environment import ServeEnvironment
from pdtrim_deploy.serving.launch import cluster_of, throttled
from pdtrim_deploy.serving.spec import ClusterSpec, RouterSpec, WorkerOptions, WorkerSpec
from pdtrim_deploy.serving.transports import Transport

__all__ = [
    "EXECUTORS",
    "Cluster",
    "ClusterSpec",
    "Engine",
    "Executors",
    "RouterSpec",
    "ServeEnvironment",
    "Transport",
    "WorkerOptions",
    "WorkerSpec",
    "cluster_of",
    "throttled",
]
