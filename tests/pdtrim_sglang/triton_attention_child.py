"""Run by test_attention_backends.py under TRITON_INTERPRET=1: SparseTritonBackend over SGLang's own decode kernel."""

import tempfile
from pathlib import Path

import torch
from decodebatch import DIM, HEADS, Batch, make_plan, sparse

from pdtrim_deploy.plan import KVSend

SPLITS = 4


def backend(batch):
    """Only the constructor, which reads the settings of a whole server, and the full layers' plan are stood in for."""
    from pdtrim_sglang.attention.triton import SparseTritonBackend
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend

    def init(self, runner):
        self.token_to_kv_pool, self.decode_attention_fwd = runner.token_to_kv_pool, decode_attention_fwd
        self.static_kv_splits, self.enable_deterministic, self.max_kv_splits = True, False, SPLITS
        self.enable_lean_attention, self.use_mla, self.use_pdl, self.dcp_size = False, False, False, 1
        self.is_draft_runner, self.page_size, self.device_core_count = False, runner.token_to_kv_pool.page_size, 1

    def plan_full(self, forward):
        rows = zip(forward.req_pool_indices, forward.seq_lens, strict=True)
        slots = [batch.rows.req_to_token[row, :length].long() for row, length in rows]
        shape, absent = (len(slots), HEADS, SPLITS), dict.fromkeys(ForwardMetadata.__dataclass_fields__)
        self.forward_metadata = ForwardMetadata(
            **absent
            | {
                "attn_logits": torch.empty(*shape, DIM),
                "attn_lse": torch.empty(*shape),
                "num_kv_splits": torch.full((len(slots),), SPLITS, dtype=torch.int32),
                "kv_indptr": torch.tensor([0, *map(len, slots)]).cumsum(0).int(),
                "kv_indices": torch.cat(slots),
            }
        )

    TritonAttnBackend.__init__, TritonAttnBackend.init_forward_metadata = init, plan_full
    return SparseTritonBackend(batch.runner)


def main():
    plan = make_plan([KVSend(), sparse(3, 5), sparse(0, 9), sparse(3, 5), sparse(4, 0)])
    for page_size, requests in ((1, [(20, 3), (6, 1), (25, 9)]), (4, [(19, 2), (33, 1)])):
        batch = Batch(Path(tempfile.mkdtemp()), plan, requests, page_size, seed=page_size)
        made = backend(batch)
        batch.note_prompts()
        torch.testing.assert_close(batch.decode(made), batch.expected(), rtol=1e-4, atol=1e-5)
        wrong = made._layers.windows
        made._layers.windows = dict.fromkeys(wrong, wrong[1])
        off = (batch.decode(made) - batch.expected()).abs().amax((1, 2))
        assert off[[0, 1, 3]].max() < 1e-4 < 1e-2 < off[[2, 4]].min(), off
    print("equal")


if __name__ == "__main__":
    main()
