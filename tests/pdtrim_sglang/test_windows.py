"""The decode index sets: first + last + generated tokens, for any batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pdtrim_sglang.attention.windows import Window, compact_table


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 6),
    st.integers(0, 6),
    st.randoms(),
)
def test_each_request_sees_exactly_first_last_and_generated(requests, first, last, random):
    context = 24
    table = torch.tensor([random.sample(range(1000), context) for _ in range(8)], dtype=torch.int32)
    rows = torch.tensor(random.sample(range(8), len(requests)))
    prompts = torch.tensor([prompt for prompt, _ in requests])
    lengths = torch.tensor([prompt + generated for prompt, generated in requests])
    slots, kept = compact_table(table, rows, lengths, prompts, Window(first, last))
    for i, (prompt, generated) in enumerate(requests):
        expected = [
            table[rows[i], p].item()
            for p in range(prompt + generated)
            if p < first or p >= prompt - last or first + last >= prompt
        ]
        assert slots[i, : kept[i]].tolist() == expected
