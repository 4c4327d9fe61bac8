"""The Python forms against a stand-in for the TensorRT module: what they answer. test_rtx.py has the real one."""

import importlib.util
from types import SimpleNamespace as Record

import numpy as np
import pytest
from pdtrim_tensorrt.python_forms import register
from pdtrim_tensorrt.rtx_libraries import rtx_environment

from pdtrim_deploy.errors import UserError

SEND = {"layer_id": 3, "num_kv_heads": 2, "head_dim": 8, "wire_dtype": "native"}
ATTENTION = {"layer_id": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "scale": 0.5}
WRITE = {"layer_id": 3, "num_kv_heads": 2, "head_dim": 8}
BASES = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")


def names(*members):
    return Record(**{member: member for member in members})


class Registry(dict):
    def register_creator(self, creator, namespace):
        return self.setdefault((namespace, creator.name), creator) is creator


@pytest.fixture
def trt():
    registry = Registry()
    return Record(
        **{base: type(base, (), {}) for base in BASES},
        registry=registry,
        get_plugin_registry=lambda: registry,
        PluginField=lambda name, data, type: Record(name=name, data=data, type=type),
        PluginFieldCollection=list,
        PluginFieldType=names("INT32", "INT64", "FLOAT32", "CHAR"),
        DataType=names("FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64"),
        TensorFormat=names("LINEAR", "CHW32"),
        DimensionOperation=names("PROD"),
        TensorRTPhase=names("BUILD", "RUNTIME"),
        DimsExprs=list,
    )


def plugin_fields(trt, attributes, integers="INT64"):
    """As the parser hands attributes over, with one that is not ours."""

    def field(name, value):
        if isinstance(value, str):
            return trt.PluginField(name, np.frombuffer(value.encode() + b"\0", np.int8), "CHAR")
        kind = integers if isinstance(value, int) else "FLOAT32"
        return trt.PluginField(name, np.array([value], kind.lower()), kind)

    return [field(*item) for item in {**attributes, "plugin_namespace": "pdtrim"}.items()]


def plugin(trt, op, attributes, integers="INT64", phase="BUILD"):
    register(trt)
    return trt.registry["pdtrim", op].create_plugin("node", plugin_fields(trt, attributes, integers), phase)


@pytest.mark.parametrize("integers", ["INT32", "INT64"])
@pytest.mark.parametrize(
    ("op", "attributes"), [("SparseKVSend", SEND), ("PagedAttention", ATTENTION), ("KVWrite", WRITE)]
)
def test_attributes_survive_a_plan(trt, op, attributes, integers):
    plugin_ = plugin(trt, op, attributes, integers)
    again = trt.registry["pdtrim", op].create_plugin("node", plugin_.get_fields_to_serialize(), "RUNTIME")
    assert vars(again.attributes) == vars(plugin_.clone().attributes) == attributes
    assert (plugin_.plugin_name, plugin_.plugin_namespace, plugin_.plugin_version) == (op, "pdtrim", "1")


@pytest.mark.parametrize(
    ("wire", "shape", "dtype"),
    [("native", [2, "R", 16], "HALF"), ("int8", [("R", 2 * 2 * (8 + 2))], "INT8"), ("fp8", [("R", 40)], "INT8")],
)
def test_what_send_gives_back(trt, wire, shape, dtype):
    plugin_ = plugin(trt, "SparseKVSend", SEND | {"wire_dtype": wire})
    build = Record(constant=lambda value: value, operation=lambda kind, left, right: (left, right))
    assert plugin_.get_output_shapes([["T", 16], ["T", 16], ["R"]], [], build) == [shape]
    assert plugin_.get_output_data_types(["HALF", "HALF", "INT64"]) == [dtype]
    good = [Record(desc=Record(type=kind, format="LINEAR")) for kind in ("HALF", "HALF", "INT64", dtype)]
    assert all(plugin_.supports_format_combination(place, good, 3) for place in range(4))
    for place, kind in enumerate(["INT8", "FLOAT", "HALF", "FLOAT"]):
        wrong = [*good[:place], Record(desc=Record(type=kind, format="LINEAR")), *good[place + 1 :]]
        assert not plugin_.supports_format_combination(place, wrong, 3)
    assert not plugin_.supports_format_combination(0, [Record(desc=Record(type="HALF", format="CHW32"))], 3)


@pytest.mark.parametrize(("op", "attributes"), [("PagedAttention", ATTENTION), ("KVWrite", WRITE)])
def test_the_other_two_give_back_the_first_inputs_shape(trt, op, attributes):
    plugin_ = plugin(trt, op, attributes)
    assert plugin_.get_output_shapes([["T", 24], ["T", 16], ["T", 16]], [], None) == [["T", 24]]
    assert plugin_.get_output_data_types(["HALF", "HALF", "HALF"]) == ["HALF"]
    same = [Record(desc=Record(type="HALF", format="LINEAR"))] * 4
    assert all(plugin_.supports_format_combination(place, same, 3) for place in range(4))


def test_it_says_why_it_does_not_run(trt):
    with pytest.raises(RuntimeError, match=r"pdtrim::PagedAttention: .* only builds engines; load libpdtrim_tensorrt"):
        plugin(trt, "PagedAttention", ATTENTION, phase="RUNTIME").clone().enqueue([], [], [], [], 0, 0)


@pytest.mark.parametrize(
    ("op", "attributes"), [("SparseKVSend", SEND), ("PagedAttention", ATTENTION), ("KVWrite", WRITE)]
)
def test_a_builder_may_time_it(trt, op, attributes):
    attached = plugin(trt, op, attributes).attach_to_context(None)
    assert attached.enqueue([], [], [], [], 0, 0) is None


def test_refusals(trt):
    with pytest.raises(ValueError, match="attribute wire_dtype is missing"):
        plugin(trt, "SparseKVSend", {name: value for name, value in SEND.items() if name != "wire_dtype"})
    with pytest.raises(RuntimeError, match="pdtrim::SparseKVSend is registered already"):
        register(trt)
    create = trt.registry["pdtrim", "SparseKVSend"].create_plugin
    with pytest.raises(ValueError, match="wire_dtype int4 is none of native, int8, fp8"):
        create("node", plugin_fields(trt, SEND | {"wire_dtype": "int4"}), "BUILD")
    with pytest.raises(ValueError, match="even head_dim"):
        create("node", plugin_fields(trt, SEND | {"wire_dtype": "fp8", "head_dim": 7}), "BUILD")


def test_tensorrt_rtx_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorrt-rtx is not installed"):
        rtx_environment(tmp_path)
