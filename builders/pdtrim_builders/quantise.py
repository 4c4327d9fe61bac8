"""Weight-only int8 for the CPU, by onnxruntime's own quantiser."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

BLOCK = 32
logger = logging.getLogger(__name__)


def quantise_weights(source: Path, target: Path) -> dict[str, int]:
    """Write `source` with its MatMuls as `MatMulNBits`: int8 weights, one scale for 32 of them. Counts of op types.

    With `accuracy_level` 4 the kernel also rounds activations to int8 in blocks; without it onnxruntime 1.32 expands
    the weights at every call and is ten times slower than float32.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
    quiet = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    quiet.setLevel(logging.WARNING)
    logger.info("waiting for onnxruntime, which quantises the weights")
    quantiser = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantiser.process()
    model = quantiser.model.model
    if model.ByteSize() > 2_000_000_000:
        onnx.save(model, target, save_as_external_data=True, location=target.name + ".data")
    else:
        target.write_bytes(model.SerializeToString(deterministic=True))
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
