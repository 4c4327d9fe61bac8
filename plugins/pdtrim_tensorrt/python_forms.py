"""IPluginV3 forms of the ops in Python, enough to parse and build engines: shapes, dtypes, formats and attributes.

They take the TensorRT module as an argument (`tensorrt_rtx` or `tensorrt`: one interface) and import neither. They do
not run, and do nothing while a builder on a GPU times them: an engine built with them runs with the C++ library
(library/), whose plugins have the same names, version, namespace and attributes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from pdtrim_deploy.plan.wire import WireDtype, packed_bytes
from pdtrim_tensorrt.kernel import KERNEL_WIRE_DTYPES

NAMESPACE, VERSION = "pdtrim", "1"


@dataclass(frozen=True)
class SendAttributes:
    """Attributes of SparseKVSend."""

    op: ClassVar[str] = "SparseKVSend"
    layer_id: int
    num_kv_heads: int
    head_dim: int
    wire_dtype: WireDtype

    def __post_init__(self) -> None:
        if self.wire_dtype not in KERNEL_WIRE_DTYPES:
            raise ValueError(f"SparseKVSend: wire_dtype {self.wire_dtype} is none of {', '.join(KERNEL_WIRE_DTYPES)}")
        if self.wire_dtype != "native" and self.head_dim % 2:
            raise ValueError("SparseKVSend: int8 and fp8 need an even head_dim")


@dataclass(frozen=True)
class AttentionAttributes:
    """Attributes of PagedAttention."""

    op: ClassVar[str] = "PagedAttention"
    layer_id: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class WriteAttributes:
    """Attributes of KVWrite."""

    op: ClassVar[str] = "KVWrite"
    layer_id: int
    num_kv_heads: int
    head_dim: int


Attributes = SendAttributes | AttentionAttributes | WriteAttributes


def register(trt: Any) -> list[Any]:
    """Register the creators with the module's plugin registry; keep the returned objects while engines are built.

    Raises:
        RuntimeError: the registry already has plugins of these names (for example from the C++ library).

    """
    registry, creators = trt.get_plugin_registry(), []
    for kind in (SendAttributes, AttentionAttributes, WriteAttributes):
        creator = _creator_class(trt)(kind)
        if not registry.register_creator(creator, NAMESPACE):
            raise RuntimeError(f"{NAMESPACE}::{kind.op} is registered already")
        creators.append(creator)
    return creators


def plugin_layers(trt: Any, network: Any) -> list[str]:
    """Names of the network's PLUGIN layers; empty if the parser inlined function bodies instead."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    kinds = (trt.LayerType.PLUGIN, trt.LayerType.PLUGIN_V2, trt.LayerType.PLUGIN_V3)
    return [layer.name for layer in layers if layer.type in kinds]


def _field(trt: Any, name: str, value: Any) -> Any:
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR)
    if isinstance(value, int):
        return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
    return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)


def _value(field: Any) -> Any:
    """An attribute from the parser or a plan: integers are INT32 or INT64, text may end in NUL."""
    data = np.asarray(field.data)
    if "CHAR" in str(field.type):
        return data.tobytes().split(b"\0")[0].decode()
    return data.ravel()[0].item()


def _creator_class(trt: Any) -> type:
    class Creator(trt.IPluginCreatorV3One):
        def __init__(self, kind: type[Attributes]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = kind.op, NAMESPACE, VERSION
            types = {
                "int": trt.PluginFieldType.INT32,
                "float": trt.PluginFieldType.FLOAT32,
                "WireDtype": trt.PluginFieldType.CHAR,
            }
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(field.name, np.array([]), types[str(field.type)]) for field in fields(kind)]
            )
            self._kind = kind

        def create_plugin(self, name: str, attributes: Any, phase: Any) -> Any:
            names = {field.name for field in fields(self._kind)}
            values = {field.name: _value(field) for field in attributes if field.name in names}
            if missing := sorted(names - values.keys()):
                raise ValueError(f"{self._kind.op}: attribute {', '.join(missing)} is missing")
            return _plugin_class(trt)(self._kind(**values), phase == trt.TensorRTPhase.BUILD)

    return Creator


def _plugin_class(trt: Any) -> type:
    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, attributes: Attributes, building: bool) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.attributes, self.building, self.num_outputs = attributes, building, 1
            self.plugin_name, self.plugin_namespace, self.plugin_version = attributes.op, NAMESPACE, VERSION

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.attributes, self.building)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([_field(trt, *item) for item in asdict(self.attributes).items()])

        def get_output_data_types(self, inputs: Any) -> list[Any]:
            return [trt.DataType.INT8 if self._quantised() else inputs[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, build: Any) -> list[Any]:
            attributes = self.attributes
            if not isinstance(attributes, SendAttributes):
                return [trt.DimsExprs(inputs[0])]
            rows = inputs[2][0]
            if not self._quantised():
                return [trt.DimsExprs([build.constant(2), rows, inputs[0][1]])]
            row = packed_bytes(
                attributes.wire_dtype, "bfloat16", attributes.num_kv_heads, attributes.head_dim, 1, first=False
            )
            return [trt.DimsExprs([build.operation(trt.DimensionOperation.PROD, rows, build.constant(row))])]

        def supports_format_combination(self, position: int, tensors: Any, num_inputs: int) -> bool:
            first, this = tensors[0].desc.type, tensors[position].desc
            if this.format != trt.TensorFormat.LINEAR:
                return False
            if isinstance(self.attributes, SendAttributes) and position == 2:
                return this.type in (trt.DataType.INT64, trt.DataType.INT32)
            if position == num_inputs and self._quantised():
                return this.type == trt.DataType.INT8
            return this.type == first and first in (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def enqueue(self, *arguments: Any) -> None:
            if self.building:  # there is one tactic: what it seems to cost decides nothing
                return
            raise RuntimeError(
                f"{NAMESPACE}::{self.attributes.op}: the Python form only builds engines; "
                "load libpdtrim_tensorrt.so (plugins/pdtrim_tensorrt/library) into the process that runs them"
            )

        def _quantised(self) -> bool:
            return isinstance(self.attributes, SendAttributes) and self.attributes.wire_dtype != "native"

    return Plugin
