from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.sizing import Link


@pytest.mark.parametrize(
    ("text", "bits"),
    [("25Gbps", 25e9), ("100Gb/s", 1e11), ("3.2Tbps", 3.2e12), ("40GB/s", 3.2e11), ("100Mb/s", 1e8), ("1 GBps", 8e9),
     ("10gbps", 1e10), ("10Gbit/s", 1e10), ("9600bps", 9600), ("0.1Gbps", 1e8), ("1kB/s", 8000)],
)  # fmt: skip
def test_units(text: str, bits: float) -> None:
    assert Link.parse(text).bits_per_s == bits


@pytest.mark.parametrize("text", ["", "25", "25G", "Gbps", "-1Gbps", "0Gbps", "0.0GB/s", "1e3Gbps", "25GiB/s",
                                  "25Gbps or so", "nanGbps", "25GB", "1.Gbps", "25Pbps",
                                  "9" * 400 + "Tbps"])  # fmt: skip
def test_bad_units_are_one_sentence_with_examples(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a link speed; .*25Gbps, 100Gb/s or 3\.2Tbps, .*40GB/s$") as caught:
        Link.parse(text)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 9999), st.sampled_from("kMGT"))
def test_printed_links_are_read_again(number: int, prefix: str) -> None:
    link = Link.parse(f"{number}{prefix}b/s")
    assert Link.parse(str(link)) == link
