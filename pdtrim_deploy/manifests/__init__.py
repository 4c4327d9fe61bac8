"""Where SGLang runs when one machine is not enough: manifests for Kubernetes and Compose from a bundle. Pure data."""

from pdtrim_deploy.manifests.compose import compose
from pdtrim_deploy.manifests.kubernetes import kubernetes
from pdtrim_deploy.manifests.options import BundleAt, Options, Served

__all__ = ["BundleAt", "Options", "Served", "compose", "kubernetes"]
