"""Tasks whose answers a served pair generates: question by question, beside the dense model's."""

from pdtrim_deploy.evaluation.generated.registry import TASKS

__all__ = ["TASKS"]
