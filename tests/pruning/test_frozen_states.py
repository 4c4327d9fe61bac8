"""Hidden states of text that training reads again: the same beside any other text, and where no file has room."""

import torch
from tinypd import text, tiny

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.pruning.healing import frozen_states
from pdtrim_deploy.pruning.healing.frozen_states import FrozenStates


def test_states_of_a_text_do_not_depend_on_the_texts_beside_it(tmp_path):
    """So training that goes on in another process, which knows no text yet, gives the same weights."""
    ids = text(4, 24)
    dense = Blockwise(tiny("Llama"))
    first, later = (FrozenStates(dense, 2, 18, tmp_path) for _ in range(2))
    first.shared(ids[:3])
    assert torch.equal(first.shared(ids[1:]), later.shared(ids[1:]))


def test_a_full_disk_costs_time_alone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ids, ran, dense = text(2, 24), list[int](), Blockwise(tiny("Llama"))
    states, plain = FrozenStates(dense, 2, 18, tmp_path), FrozenStates(dense, 2, 18).judged(ids)
    monkeypatch.setattr(frozen_states, "mapped", full)
    hook = dense.layers[0].register_forward_hook(lambda *_: ran.append(1))
    for _ in range(2):
        torch.testing.assert_close(states.judged(ids.clone()), plain)
    hook.remove()
    assert len(ran) == 2 * len(ids), "run again, a text at a time"
