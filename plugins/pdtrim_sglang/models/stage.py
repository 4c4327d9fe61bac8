"""A stage whose forward pass is an engine's. Written against the model interface of SGLang 0.5.23 (models/llama.py).

The engine computes embedding, projections, RoPE, MLP and norms; attention is SGLang's backend over its paged pool, and
LM head, logprobs and sampling are SGLang's. So radix cache, chunked prefill, sparse decode windows and grammars work
as with SGLang's own models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import ARGUMENT, WorkerConfig, key
from pdtrim_sglang.executors import StageExecutor, load_engine
from pdtrim_sglang.kv_only import WriteKV
from pdtrim_sglang.staging import Staging


class PDTrimStageForCausalLM(nn.Module):
    """Llama, Mistral, Qwen2 and Qwen3 stages alike: what differs is in the graph.

    Of the checkpoint only the LM head is loaded, for the logits; all other weights live in the engine. `staging` is
    set on a prefill worker: the engine then packs the rows to send.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        if get_parallel().tp_size > 1 or quant_config is not None:
            raise RuntimeError(
                "pdtrim: engines have one rank and their own weights: start without --tp-size, --quantization"
            )
        self.config, self.staging = config, None
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        engine = WorkerConfig.of_model(config).engine
        if engine is None:
            raise RuntimeError(f"pdtrim: {ARGUMENT} names no {key('engine')}: start workers with pdtrim-deploy serve")
        self._engine_config, self._plan = engine, PDPlan.parse(config.pdtrim, "config.json")
        self.attention = nn.ModuleList(  # of KV layers, by whose numbers the graph's nodes go
            RadixAttention(heads, head_dim, head_dim**-0.5, num_kv_heads=kv_heads, layer_id=layer)
            for layer in range(len(self._plan.kv_blocks(engine.stage)))
        )
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config)
        self._layers: list[Any] = list(self.attention)
        self._batch: Any = None
        if engine.stage == "prefill":
            for at in self._plan.kv_only_layers:
                layer = self._plan.prefill_kv_blocks.index(self._plan.prefill_layers[at])
                self._layers[layer] = WriteKV(self.attention[layer])

    staging: Staging | None
    _engine: StageExecutor

    @property
    def packs_rows(self) -> bool:
        """Whether the engine packs the rows to send, given a `staging`."""
        return self._engine.packs

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, input_embeds: Any = None) -> Any:
        """Logits of the batch's last tokens; input_ids, positions int64 `[T]`."""
        assert input_embeds is None, "engines take token ids"
        self._batch = forward_batch
        sends = self._sends(forward_batch, len(input_ids))
        if self.staging is None or sends is None:
            hidden = self._engine.run(input_ids, positions)
        else:
            hidden = self._engine.run(input_ids, positions, sends.rows, sends.packed)
            self.staging.commit(sends, _event(hidden))
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The LM head, or the embedding it is tied to, which the engine then shares; and the engine itself."""
        head, tied = self.lm_head.weight, self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        weight = next((tensor for key, tensor in weights if key == name), None)
        if weight is None:
            raise RuntimeError(f"pdtrim: the checkpoint has no {name}; build the bundle again")
        getattr(head, "weight_loader", default_weight_loader)(head, weight)
        embedding = head.data[: self.config.vocab_size] if tied else None  # SGLang pads the vocabulary
        self._engine = load_engine(self._engine_config, self._plan, self._attend, embedding)
        if self._engine.dtype != head.dtype:
            raise RuntimeError(
                f"pdtrim: the engine computes in {self._engine.dtype}, this worker in {head.dtype}: "
                "build the engine in the bundle's dtype"
            )

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._layers[layer](q, k, v, self._batch)

    def _sends(self, batch: Any, tokens: int) -> Any:
        if self.staging is None or not batch.forward_mode.is_extend() or not batch.rids:
            return None
        if sum(batch.extend_seq_lens_cpu) != tokens:  # padded: its rows are not those of the requests
            return None
        return self.staging.batch(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)


def _event(tensor: Tensor) -> Any:
    return None if tensor.is_cpu else torch.cuda.current_stream(tensor.device).record_event()


EntryClass = PDTrimStageForCausalLM
