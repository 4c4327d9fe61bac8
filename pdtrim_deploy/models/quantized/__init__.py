"""FP8 checkpoints: read as the weights that their codes and scales stand for, written in the format they came in."""

from pdtrim_deploy.models.quantized.base import Quantized
from pdtrim_deploy.models.quantized.registry import FORMATS, read_quantized, stored_weights, with_quantization

__all__ = ["FORMATS", "Quantized", "read_quantized", "stored_weights", "with_quantization"]
