"""Kubernetes and Compose manifests that serve a bundle on several GPUs or machines. Pure data."""

from pdtrim_deploy.manifests.compose import compose
from pdtrim_deploy.manifests.kubernetes import kubernetes
from pdtrim_deploy.manifests.options import BundleAt, Options, Served
from pdtrim_deploy.manifests.text import yaml_text

__all__ = ["BundleAt", "Options", "Served", "compose", "kubernetes", "yaml_text"]
