"""Prompt KV of a batch of sequences as it arrives in each wire dtype, in a file that is read layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.layer_kv import LayerKV, Ranges
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import WireDtype


class PromptKV:
    """Decode's KV of the prompts of `state`, all rows of every layer, for each of `dtypes`.

    The file has no name and is deleted with this object. It has shape `[dtypes, layers, batch, 2, kv_heads, tokens,
    head_dim]`, in the smaller dtype of pool and model, which loses nothing because values went through both. Sequences
    are unpacked one by one, so that only one sequence's KV is in memory in all wire dtypes.

    Args:
        oracle: decode's model, and the prefill layer of each of its layers.
        state: the result of prefill.
        dtypes: wire dtypes to store.
        folder: folder of the file; None: the system's folder of temporary files.

    Raises:
        UserError: the disk is full.

    """

    def __init__(self, oracle: PDOracle, state: PrefillState, dtypes: Sequence[WireDtype], folder: Path | None) -> None:
        pool, self._model_dtype = state.keys[0], oracle.decode_model.dtype
        self._pool = oracle.fp8_pool
        self._dtypes, self._layers = tuple(dtypes), len(oracle.plan.kv)
        self._stored = min(pool.dtype, self._model_dtype, key=lambda dtype: dtype.itemsize)
        self._shape = (state.batch, 2, pool.shape[1], state.tokens, pool.shape[2])
        self._row = self._stored.itemsize * torch.Size(self._shape[1:]).numel()  # bytes of a layer of a sequence
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - goes with this object
            oracle = oracle.with_windows(())  # rows before a window, too, which nobody reads: one shape for all layers
            for dtype in self._dtypes:
                sent = oracle.with_kv((KVSend(wire_dtype=dtype),) * self._layers)
                for sequence in range(state.batch):
                    for layer, kv in enumerate(sent.hand_over(state.sequence(sequence))):
                        self._write(dtype, layer, sequence, kv)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"no room for the prompts' KV in {folder or tempfile.gettempdir()} ({error.strerror}); free some space "
                "there, or lower kv.sequences, and run the same command again"
            ) from error

    def read(self, dtype: WireDtype, layer: int, ranges: Ranges) -> LayerKV:
        """A decode layer's KV at the positions of `ranges`: new tensors on the host, in the model's dtype."""
        buffer = torch.empty(self._shape, dtype=self._stored)
        self._file.seek(self._offset(dtype, layer, 0))
        self._file.readinto(_bytes_of(buffer))
        all_rows = ((0, self._shape[3]),)
        sides = buffer if ranges == all_rows else torch.cat([buffer[..., lo:hi, :] for lo, hi in ranges], -2)
        keys, values = sides.to(self._model_dtype).unbind(1)
        return LayerKV(keys, values, ranges, self._pool)

    def _write(self, dtype: WireDtype, layer: int, sequence: int, kv: LayerKV) -> None:
        assert kv.keys is not None
        assert kv.values is not None
        self._file.seek(self._offset(dtype, layer, sequence))
        self._file.write(_bytes_of(torch.cat((kv.keys, kv.values)).to(self._stored).cpu().contiguous()))

    def _offset(self, dtype: WireDtype, layer: int, sequence: int) -> int:
        return ((self._dtypes.index(dtype) * self._layers + layer) * self._shape[0] + sequence) * self._row


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
