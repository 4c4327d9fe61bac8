"""Log-probabilities from pieces of the vocabulary: those of log-softmax, without a matrix of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.vocabulary import PIECE, ROWS, in_pieces, token_logprobs


class Largest(TorchDispatchMode):
    """Counts products, and the numbers in the largest tensor that any operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.products = self.multiplied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products += 1
            self.multiplied += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize(("positions", "vocabulary", "scaling"), [(3, 7, None), (ROWS + 5, 3 * PIECE + 1, 4.0)])
def test_they_are_those_of_log_softmax(positions: int, vocabulary: int, scaling: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, normed = (torch.randn(n, 16, generator=draw) for n in (vocabulary, positions))
    targets = torch.randint(vocabulary, (positions,), generator=draw)
    targets[:2] = torch.tensor([0, vocabulary - 1])
    logits = normed.double() @ weight.double().T / (scaling or 1.0)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(weight, normed, targets, scaling).double(), expected, atol=5e-6, rtol=0)


@torch.no_grad()
def test_the_same_products_and_no_matrix_of_all_logits(tiny_dir: Any) -> None:
    model = load_model(tiny_dir("LlamaForCausalLM"))
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 40 * PIECE, bias=False)
    runner, hidden = Blockwise(model), torch.randn(2, 50, model.config.hidden_size)
    targets = torch.randint(40 * PIECE, (2, 50))
    with Largest() as largest:
        ours = runner.logprobs(hidden, targets)
    assert largest.numbers == 2 * 50 * PIECE
    assert largest.products == 40
    assert largest.multiplied == 2 * 50 * 40 * PIECE * model.config.hidden_size
    expected = runner.logits(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)


def test_a_head_that_does_more_than_multiply_is_called() -> None:
    head = torch.nn.Linear(4, 9, bias=False)
    assert in_pieces(head)
    assert not in_pieces(torch.nn.Linear(4, 9))
    assert not in_pieces(head.to(torch.bfloat16))
    hooked = torch.nn.Linear(4, 9, bias=False)
    hooked.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    assert not in_pieces(hooked)
