"""How many weights a model has and how large its parts are, from its config.json alone: everybody counts by this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.families import attention_sizes


@dataclass(frozen=True)
class ModelSizes:
    """Of a Llama-like model, in weights; norms and biases are left out: less than one per mille.

    Attributes:
        blocks: how many there are.
        hidden, inner, vocabulary: of a hidden state, of the MLP between its maps, of the logits.
        kv_width: of K, and of V, of one token in one block.
        block: weights of one block; `kv` are those of its K and V projections.
        ends: weights of embedding and LM head.

    """

    blocks: int
    hidden: int
    inner: int
    vocabulary: int
    kv_width: int
    block: int
    ends: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSizes:
        """`config` is config.json's."""
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        heads, kv_heads, head = attention_sizes(config)
        return cls(
            blocks=config["num_hidden_layers"],
            hidden=hidden,
            inner=inner,
            vocabulary=vocabulary,
            kv_width=kv_heads * head,
            block=2 * hidden * head * (heads + kv_heads) + 3 * hidden * inner,
            ends=(1 if config.get("tie_word_embeddings") else 2) * vocabulary * hidden,
        )

    @property
    def kv(self) -> int:
        """Weights of one block's K and V projections: all that is computed of a block that runs for its KV alone."""
        return 2 * self.hidden * self.kv_width

    @property
    def total(self) -> int:
        """Weights of the model."""
        return self.blocks * self.block + self.ends

    @property
    def fit_bytes(self) -> int:
        """Bytes of one block's normal equations (`least_squares.Ridge`), in float64.

        There is one set for fitting and one for choosing the penalty, and two more squares while it is solved.
        """
        return 8 * (4 * self.inner * self.inner + 3 * self.inner * self.hidden)

    @property
    def fit_flops(self) -> int:
        """Operations a token of summing up one block's normal equations."""
        return 2 * self.inner * (self.inner + self.hidden)
