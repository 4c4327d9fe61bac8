"""TensorRT plugin for sparse KV sending."""
