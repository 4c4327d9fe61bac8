"""TensorRT plugins of domain `pdtrim`: `SparseKVSend`, `PagedAttention` and `KVWrite`.

    kernels/    the CUDA kernel of SparseKVSend, without TensorRT; kernels/wire_format.h describes the packed bytes
    library/    IPluginV3 forms of the ops in C++, built by CMake where TENSORRT_ROOT has the headers
    python_forms.py   the same in Python, for building engines where no C++ library was built
    compile_kernels.py  `make plugin`
    kernel.py, plugin_library.py  the kernel's and the plugins' library from Python (ctypes)
    rtx_libraries.py  the environment that TensorRT for RTX needs to build with plugins

Wire dtypes: native, int8, fp8; not int4. An engine's quantised output is int8 [bytes], to be read as uint8.

What has been tested, and what has not (without a GPU):

    kernel        compiled by nvcc 13.0 for sm_80, 90, 100, 120 with no spill (`make plugin`); its source, compiled for
                  the host, is bit-equal to kvcache.pack (native, int8, fp8); never run on a GPU, speed unknown
    C++ plugins   compiled against TensorRT 11.1's headers; attributes, formats and enqueue driven on the host; loaded
                  by TensorRT for RTX 1.7.1, which builds engines with them; never run on a GPU
    Python forms  TensorRT for RTX 1.7.1 parses each node to one PLUGIN layer and builds engines; enqueue raises
    PagedAttention's callback into SGLang  called on the host with made-up pointers; never run inside an engine
"""
