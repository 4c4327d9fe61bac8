"""Where tensor-parallel ranks go, and which numbers of them are refused before anything starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import LinearStates, ModelShape, PDPlan
from pdtrim_deploy.serving.ranks import STATIC_SHARE, attention_groups, place, require_arguments, require_ranks

SHAPE = {"architecture": "LlamaForCausalLM", "fingerprint": "f", "num_blocks": 2, "head_dim": 16, "kv_dtype": "float32"}
RANKS = st.lists(st.integers(1, 8), min_size=2, max_size=9)


def plan(heads=8):
    return PDPlan.dense(ModelShape(num_kv_heads=heads, **SHAPE))


def hybrid():
    states = LinearStates(blocks=(0,), key_heads=4, key_dim=8, value_heads=8, value_dim=8, conv_columns=3)
    return PDPlan.dense(plan().model.model_copy(update={"states": states, "num_blocks": 2}))


@given(ranks=RANKS, spare=st.integers(0, 5), share=st.booleans())
def test_ranks_are_on_gpus_of_their_own_whenever_there_are_enough(ranks, spare, share):
    placements = place(ranks, sum(ranks) + spare, share)
    taken = [gpu for placement in placements for gpu in placement.gpus]
    assert len(taken) == len(set(taken)) == sum(ranks)
    assert set(taken) <= set(range(sum(ranks) + spare))
    assert [placement.ranks for placement in placements] == ranks
    assert all(placement.memory_fraction is None for placement in placements)


@given(ranks=RANKS, gpus=st.integers(0, 80))
def test_too_few_gpus_are_refused_with_both_numbers(ranks, gpus):
    if gpus >= sum(ranks):
        return
    with pytest.raises(UserError, match=rf"need {sum(ranks)} GPUs and there (is|are) {gpus} here.*--share-gpus"):
        place(ranks, gpus)


@given(ranks=RANKS, gpus=st.integers(1, 80))
def test_shared_gpus_exist_and_their_workers_take_no_more_than_there_is(ranks, gpus):
    if gpus < max(ranks):
        with pytest.raises(UserError, match=f"need {max(ranks)} GPUs? and there (is|are) {gpus} "):
            place(ranks, gpus, share=True)
        return
    free = dict.fromkeys(range(gpus), 1.0)  # of each GPU's memory, while the workers start one after another
    for placement, count in zip(place(ranks, gpus, share=True), ranks, strict=True):
        assert len(placement.gpus) == count
        assert set(placement.gpus) <= set(free)
        if placement.memory_fraction is not None:
            assert 0 < placement.memory_fraction < 1
            for gpu in placement.gpus:
                free[gpu] -= placement.memory_fraction * min(free[gpu] for gpu in placement.gpus)
    assert min(free.values()) > 1 - STATIC_SHARE - 0.02  # fractions are rounded to 0.01


def test_two_workers_on_one_gpu_take_equal_parts_of_it():
    first, second = (placement.memory_fraction for placement in place([1, 1], 1, share=True))
    assert first == pytest.approx(second * (1 - first), abs=0.01)


@pytest.mark.parametrize(
    ("heads", "prefill", "decode", "says"),
    [
        (12, 4, 6, "--tp-prefill 4 --tp-decode 6: attention is divided among 4 ranks in prefill, .*; give a multiple"),
        (8, 3, 3, "--tp-prefill 3: 8 KV heads can neither be divided .*; use one of 1, 2, 4, 8, or a multiple of 8"),
        (8, 1, 12, "--tp-decode 12: 8 KV heads can neither be divided among 12 ranks nor"),
    ],
)
def test_ranks_that_cannot_be_served_are_refused(heads, prefill, decode, says):
    with pytest.raises(UserError, match=says):
        require_ranks(plan(heads), prefill, decode)


def test_states_of_linear_attention_need_equal_ranks_that_divide_their_heads():
    require_ranks(hybrid(), 4, 4)
    with pytest.raises(UserError, match=r"--tp-prefill 4 --tp-decode 2: .*between equal numbers of ranks alone"):
        require_ranks(hybrid(), 4, 2)
    with pytest.raises(UserError, match="--tp-decode 8: 4 key heads and 8 value heads cannot be divided among 8"):
        require_ranks(hybrid(), 8, 8)


def test_on_a_cpu_heads_that_sglang_would_pad_are_refused():
    with pytest.raises(UserError, match=r"--tp-decode 16: SGLang pads 8 KV heads for 16 ranks on a CPU.*1, 2, 4, 8$"):
        require_ranks(plan(), 8, 16, "cpu")
    require_ranks(plan(), 8, 4, "cpu")


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (8, 8), (2, 2), (4, 8), (8, 4), (1, 2), (16, 8), (8, 16)])
def test_other_ranks_are_not(prefill, decode):
    require_ranks(plan(), prefill, decode)


@pytest.mark.parametrize("word", ["--tp", "--tp-size", "--tp-size=2", "--tensor-parallel-size", "--dp-size", "--dp=2"])
def test_arguments_that_would_place_ranks_behind_our_back_are_refused(word):
    with pytest.raises(UserError, match=r"--decode-args has .*: (say --tp-prefill|start more workers)"):
        require_arguments(("--log-level", "info", word, "2"), "--decode-args")


@pytest.mark.parametrize("words", ["--enable-dp-attention --dp-size 2 --tp-probe", "--attn-dp-size 2"])
def test_data_parallel_attention_takes_no_gpus_of_its_own(words):
    require_arguments(words.split(), "--worker-args")
    assert attention_groups(words.split()) == 2


def test_replicas_beside_data_parallel_attention_are_refused():
    with pytest.raises(UserError, match="--worker-args has --dp-size 3: start more workers"):
        require_arguments(("--attn-dp-size", "2", "--enable-dp-attention", "--dp-size", "3"), "--worker-args")


def test_groups_that_are_no_number_are_refused():
    with pytest.raises(UserError, match=r"--attn-dp-size.*invalid int value: 'two'; give a number of groups"):
        attention_groups(("--attn-dp-size", "two"))


def test_heads_and_states_are_divided_among_ranks_of_a_group():
    require_ranks(hybrid(), 1, 2, groups=(1, 2))
    require_ranks(hybrid(), 2, 2, groups=(2, 2))
    sizes = "--tp-prefill 2 --tp-decode 2, divided by --attn-dp-size 1 and 2"
    with pytest.raises(UserError, match=f"{sizes}: states of linear attention are sent between equal numbers"):
        require_ranks(hybrid(), 2, 2, groups=(1, 2))
    require_ranks(plan(2), 3, 3, groups=(3, 3))  # whole heads in each rank
    with pytest.raises(UserError, match="among 4 ranks in prefill, among 6 in decode"):
        require_ranks(plan(12), 4, 12, groups=(1, 2))
    with pytest.raises(UserError, match="--tp-decode 2: --attn-dp-size 4 divides these ranks; give a multiple of 4"):
        require_ranks(plan(), 1, 2, groups=(1, 4))
    with pytest.raises(UserError, match=r"--tp-decode 12: .*; use one of 4, 8, 16, 32, or a multiple of 32"):
        require_ranks(plan(), 1, 12, groups=(1, 4))
    with pytest.raises(UserError, match="SGLang pads 8 KV heads for 16 ranks on a CPU"):
        require_ranks(plan(), 8, 16, "cpu", groups=(1, 2))
