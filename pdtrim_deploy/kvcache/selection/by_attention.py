"""The paper's rule (PDTrim, arXiv:2509.04467): cut the layers whose attention rests on first and last tokens."""

from __future__ import annotations

from pdtrim_deploy.kvcache.attention_mass import attention_mass
from pdtrim_deploy.kvcache.selection.base import Progress, Request
from pdtrim_deploy.plan import KVSend


class ByAttentionMass:
    """The `sparse_layers` layers with most mass on first + last. Mass does not predict harm: it is a baseline."""

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """Rank by `AttentionMass.kept`; ties go to the earlier layer."""
        mass = attention_mass(
            request.oracle,
            request.sequences,
            request.prompt_tokens,
            request.n_first,
            request.n_last,
            progress=progress,
        ).kept
        ranked = sorted(range(request.layers), key=lambda layer: (-float(mass[layer]), layer))
        return request.sends(ranked[: request.sparse_layers])
