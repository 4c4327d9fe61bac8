"""What the doctor reads in the serve environment agrees with what is there."""

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")


def test_the_pinned_sglang_has_everything_that_the_plugin_takes():
    from pdtrim_sglang import hook_targets
    from pdtrim_sglang.diagnosis import diagnose

    report = diagnose()
    assert report["packages"]["sglang"] == hook_targets.READ_AGAINST
    assert report["plugin"]
    assert len(report["targets"]) == len(hook_targets.TARGETS)
    assert all(report["targets"].values())
    assert all(report["imports"].values())
    assert "sglang.srt.disaggregation.common.conn.CommonKVManager" in report["imports"]


def test_transports_are_those_of_the_registry():
    from pdtrim_sglang.diagnosis import LIBRARIES, transports
    from pdtrim_sglang.transports import TRANSPORTS

    assert transports() == list(TRANSPORTS)
    assert set(LIBRARIES) >= set(TRANSPORTS)


def test_a_misfit_is_one_sentence():
    from pdtrim_sglang.diagnosis import diagnose, misfit

    report = diagnose()
    assert misfit(report) is None
    assert "SGLang is 9.9; this plugin was written for" in str(misfit(report | {"packages": {"sglang": "9.9"}}))
    assert misfit(report | {"targets": {"sglang.x": False}}) == "SGLang 0.5.23 has no sglang.x"
    assert "entry point" in str(misfit(report | {"plugin": False}))
