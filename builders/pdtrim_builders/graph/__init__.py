"""From a stage checkpoint to one ONNX graph."""
