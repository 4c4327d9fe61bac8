"""Lists of modules in a stage's settings: each module of the stage is in them exactly if its block's was."""

import re
from fnmatch import fnmatchcase

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.quantized.module_lists import cut_settings

LEAVES = ("mlp.gate", "mlp.experts.0.up_proj", "self_attn.q_proj")
NAMES = [f"model.layers.{block}.{leaf}.weight" for block in range(12) for leaf in LEAVES] + ["lm_head.weight"]
BLOCKS = [0, 3, 10, 11]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["lm_head", "model.layers.3.mlp.gate", "model.layers.4.mlp.gate"], ["lm_head", "model.layers.1.mlp.gate"]),
        (["model.layers.1"], []),  # and not those of blocks 10 and 11
        (["model.layers.10", "layers.11.mlp"], ["model.layers.2", "layers.3.mlp"]),
        (["gate", "mlp.gate"], ["gate", "mlp.gate"]),
        (["re:.*lm_head", "re:.*mlp.gate$"], ["re:.*lm_head", "re:.*mlp.gate$"]),
        (["*gate*"], ["*gate*"]),
        (["re:.*layers\\.(3|4)\\..*gate$"], ["model.layers.1.mlp.gate"]),
        (["re:.*layers\\.\\d\\..*gate$"], ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),  # of 0 to 9
    ],
)
def test_entries_follow_their_blocks(entries, expected):
    section = {"quant_method": "x", "deep": {"ignore": entries}, "targets": ["Linear"]}
    cut = cut_settings(section, BLOCKS, NAMES)
    assert cut == {"quant_method": "x", "deep": {"ignore": expected}, "targets": ["Linear"]}
    assert section["deep"]["ignore"] is entries


@pytest.mark.parametrize("entry", ["model.layers.1*", "model.layers.*0*", "re:model.layers.1", "re:.*[02].*up_proj"])
def test_a_pattern_of_numbers_means_the_same_modules(entry):
    def matches(entries, module):
        return any(
            re.match(entry[3:], module) if entry.startswith("re:") else fnmatchcase(module, entry) for entry in entries
        )

    (cut,) = cut_settings({"exclude_modules": [entry]}, BLOCKS, NAMES).values()
    for index, block in enumerate(BLOCKS):
        for leaf in LEAVES:
            before = matches([entry], f"model.layers.{block}.{leaf}")
            assert matches(cut, f"model.layers.{index}.{leaf}") == before, (block, leaf)


def test_what_kv_pools_have_is_the_plans_matter():
    section = {"quantization": {"kv_cache_quant_algo": "FP8"}, "kv_cache_scheme": {"num_bits": 8}}
    assert cut_settings(section, [0], NAMES) == {"quantization": {"kv_cache_quant_algo": None}, "kv_cache_scheme": None}


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"pattern '\(' is no regular expression"):
        cut_settings({"ignore": ["re:("]}, BLOCKS, NAMES)
