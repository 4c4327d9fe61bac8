"""The GPU form of pack and unpack: Triton kernels that execute a chunk's table in one launch each way."""
