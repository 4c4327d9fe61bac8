"""Run by test_attention_backends.py under TRITON_INTERPRET=1: SparseTritonBackend over SGLang's own decode kernel."""

import copy
import tempfile
from pathlib import Path

import torch
from decodebatch import DIM, HEADS, KV_HEADS, Batch, layer_of, make_plan, sparse
from pdtrim_sglang.attention.triton_indices import BLOCK_TOKENS, list_slots
from pdtrim_sglang.attention.windows import Window, compact_table, hidden_tokens

from pdtrim_deploy.plan import KVSend

SPLITS, GRAPH = 4, 4  # GRAPH: requests that a CUDA graph was captured for


def backend(batch):
    """Only the constructor, which reads the settings of a whole server, and the full layers' plans are stood in for."""
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

    def init_graph(self, max_bs, max_num_tokens):
        self.cuda_graph_kv_indices = torch.zeros(10_000, dtype=torch.int64)
        self.graph_indptr = torch.zeros(max_bs + 1, dtype=torch.int32)

    def plan_graph(self, forward, in_capture=False):
        kept = self.__dict__.get("forward_metadata")
        plan_full(self, forward)
        made, requests = self.forward_metadata, forward.batch_size
        self.graph_indptr[: requests + 1] = made.kv_indptr
        self.cuda_graph_kv_indices[: len(made.kv_indices)] = made.kv_indices
        made.kv_indptr, made.kv_indices = self.graph_indptr[: requests + 1], self.cuda_graph_kv_indices
        self.forward_metadata = made if in_capture else kept

    TritonAttnBackend.__init__, TritonAttnBackend.init_forward_metadata = init, plan_full
    TritonAttnBackend.init_cuda_graph_state = init_graph
    TritonAttnBackend.init_forward_metadata_out_graph = plan_graph
    return SparseTritonBackend(batch.runner)


def padded(forward):
    """The batch as SGLang hands it to a graph for more requests: row 0, one token, slot 0."""
    more = GRAPH - forward.batch_size
    view = copy.copy(forward)
    view.batch_size, view.seq_lens_sum = GRAPH, forward.seq_lens_sum + more
    view.req_pool_indices = torch.cat((forward.req_pool_indices, torch.zeros(more, dtype=torch.int64)))
    view.seq_lens = torch.cat((forward.seq_lens, torch.ones(more, dtype=torch.int64)))
    view.out_cache_loc = torch.cat((forward.out_cache_loc, torch.zeros(more, dtype=torch.int64)))
    return view


def replay(made, batch, forward):
    """One step of a captured graph: the kernels read what they were given at capture, wherever Python points now."""
    more, requests = GRAPH - batch.forward.batch_size, batch.forward.batch_size
    q = torch.cat((batch.queries, torch.randn(more, HEADS * DIM)))
    k, v = (torch.cat((rows, torch.randn(more, KV_HEADS, DIM))) for rows in (batch.keys, batch.values))
    layers = range(len(batch.plan.kv))
    return torch.stack([made.forward_decode(q, k, v, layer_of(i), forward)[:requests] for i in layers])


def graphs(batch, other):
    """Captured on a batch of padding, then replayed for `batch`; between, `other` goes without a graph."""
    made = backend(batch)
    made.init_cuda_graph_state(2 * GRAPH, 2 * GRAPH)
    nobody = copy.copy(batch.forward)
    nobody.batch_size, nobody.seq_lens_sum = 0, 0
    nobody.req_pool_indices = nobody.seq_lens = nobody.out_cache_loc = torch.zeros(0, dtype=torch.int64)
    made.init_forward_metadata_out_graph(padded(nobody), in_capture=True)
    captured = made.forward_metadata, made._sparse
    batch.note_prompts()
    made.init_forward_metadata(other)
    assert made._sparse is not captured[1]
    view = padded(batch.forward)
    made.init_forward_metadata_out_graph(view)
    made.forward_metadata, made._sparse = captured
    torch.testing.assert_close(replay(made, batch, view), batch.expected(), rtol=1e-4, atol=1e-5)
    made.init_forward_metadata_out_graph(padded(other))  # what is not filled anew is another batch's
    assert (replay(made, batch, view)[:, 0] - batch.expected()[:, 0]).abs().amax(-1).min() > 1e-2


def own_slots(batch):
    """Layers that have slots of their own are given those."""
    made = backend(batch)
    batch.note_prompts()
    shift = torch.arange(batch.pool.size + batch.pool.page_size).roll(1)
    made._layers._kept = {window: type("Kept", (), {"map": shift}) for window in made._layers.distinct}
    made.init_forward_metadata(batch.forward)
    for window, (slots, lengths) in made._layers.tables(batch.forward).items():
        listed = made._sparse[window]
        ranges = zip(listed.kv_indptr[:-1], listed.kv_indptr[1:], strict=True)
        rows = [listed.kv_indices[start:stop] for start, stop in ranges]
        assert [row.tolist() for row in rows] == [row[:n].tolist() for row, n in zip(slots, lengths, strict=True)]
        newest = [shift[slot] for slot in batch.forward.out_cache_loc]
        assert [row[-1] for row in rows] == newest


def long_requests():
    """Lists of several of the kernel's blocks, and lists that find no room: what is behind them stays as it was."""
    table, rows = torch.randperm(4 * 1500, dtype=torch.int32).view(4, 1500), torch.tensor([3, 1, 2])
    lengths, prompts, window = torch.tensor([1400, 2 * BLOCK_TOKENS, 3]), torch.tensor([900, 0, 2]), Window(5, 300)
    slots, kept = compact_table(table, rows, lengths, prompts, window)
    assert kept.tolist() == [805, 2 * BLOCK_TOKENS, 3]
    expected = torch.cat([row[:n] for row, n in zip(slots, kept, strict=True)]).long()
    indptr = torch.tensor([0, *kept.cumsum(0)], dtype=torch.int32)
    for room in (len(expected), 900):
        buffer = torch.full((len(expected) + 10,), -1)
        list_slots(table, rows, hidden_tokens(lengths, prompts, window), indptr, buffer[:room], window)
        assert torch.equal(buffer[:room], expected[:room])
        assert bool((buffer[room:] == -1).all())


def main():
    long_requests()
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
        graphs(batch, batch.part(1))
        own_slots(batch)
    print("equal")


if __name__ == "__main__":
    main()
