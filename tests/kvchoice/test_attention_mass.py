import pytest
import torch
from tinypd import BLOCKS, FAMILIES, HEADS, KV_HEADS, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.kvchoice.attention_mass import attention_mass


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mass_of_the_full_sequence(family):
    model, ids = tiny(family), text(5, 20)
    oracle = make_oracle(model, make_plan(kv=(SPARSE,) * BLOCKS))
    mass = attention_mass(oracle, ids, 12, 3, 4, batch=2)
    eager = tiny(family, attention="eager")
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions
    for layer, seen in enumerate(weights):
        rows = seen[:, :, 12:-1, :-1].unflatten(1, (KV_HEADS, HEADS // KV_HEADS)).mean((0, 2, 3)).double()
        parts = {"first": rows[:, :3], "middle": rows[:, 3:8], "last": rows[:, 8:12], "generated": rows[:, 12:]}
        for name, expected in parts.items():
            torch.testing.assert_close(getattr(mass, name)[layer], expected.sum(1), atol=1e-5, rtol=0)
    assert mass.prompt_ends.std() > 1e-3


@pytest.mark.parametrize(("first", "last"), [(3, 4), (0, 5), (5, 0), (8, 9), (40, 0), (0, 40)])
def test_parts_sum_to_one_whatever_the_sizes(first, last):
    oracle = make_oracle(tiny("Llama"), make_plan(decode=(1,)))
    mass = attention_mass(oracle, text(3, 18), 10, first, last)
    total = mass.first + mass.last + mass.middle + mass.generated
    torch.testing.assert_close(total, torch.ones_like(total))
    assert mass.first.shape == (BLOCKS - 1, KV_HEADS)
    assert (mass.middle.sum() == 0) == (first + last >= 10)
    assert (mass.last.sum() == 0) == (last == 0 or first >= 10)


def test_the_model_is_left_as_it_was():
    model, ids = tiny("Llama"), text(2, 18)
    oracle = make_oracle(model, make_plan())
    with torch.no_grad():
        before = oracle.decode_model(ids).logits
        attention_mass(oracle, ids, 10, 2, 2)
        assert torch.equal(oracle.decode_model(ids).logits, before)
    assert oracle.decode_model.config._attn_implementation == "sdpa"
    assert not any(layer.self_attn._forward_hooks for layer in oracle.decode_model.model.layers)
