"""What every block of the dense model reads on calibration text, kept in files: no model is needed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_kv import Span


class HiddenFiles:
    """`x_0 .. x_L` of text `[S, T]`, float32, one file each; `x_i` is read by block `i`, `x_L` by the final norm.

    Disk: (blocks + 1) x S x T x hidden x 4 bytes (292 MB for 16 x 256 tokens of SmolLM2-135M). They are mapped, so
    in memory are the parts in use.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape

    @classmethod
    @torch.no_grad()
    def record(
        cls, model: CausalLM, ids: Tensor, folder: Path, batch: int = 4, note: Callable[[str], None] = lambda _: None
    ) -> HiddenFiles:
        """Run `ids`, int64 `[S, T]`, each block on all of it, for it may come from disk. OSError when that is full."""
        runner, spans = Blockwise(model), list[Span]()
        with (folder / "x0.f32").open("wb") as file:
            for part in ids.split(batch):
                hidden, span = runner.embed(part)
                spans.append(span)
                _append(file, hidden)
        files = cls(folder, (*ids.shape, hidden.shape[-1]))
        for block in range(len(runner.layers)):
            with (folder / f"x{block + 1}.f32").open("wb") as file:
                for read, span in zip(files[block].split(batch), spans, strict=True):
                    _append(file, runner.block(block, read.to(hidden.dtype), span))
            note(f"hidden states: {block + 1}/{len(runner.layers)} blocks")
        return files

    def __getitem__(self, block: int) -> Tensor:
        """`x_block`, float32 `[S, T, hidden]` on the host; not to be written to."""
        sequences, tokens, hidden = self.shape
        size = sequences * tokens * hidden
        flat = torch.from_file(str(self.folder / f"x{block}.f32"), shared=False, size=size, dtype=torch.float32)
        return flat.view(self.shape)


def _append(file: object, hidden: Tensor) -> None:
    file.write(hidden.float().cpu().contiguous().numpy().data)  # type: ignore[attr-defined]
