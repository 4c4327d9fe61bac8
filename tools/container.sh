#!/usr/bin/env bash
# The steps of the Dockerfile's RUN lines, so that each can be tried without a Docker engine:
#   tools/container.sh wheel OUT          the wheel, from a copy of the sources
#   tools/container.sh plugin OUT         libpdtrim_tensorrt.so; nvcc, cmake and TENSORRT_ROOT/include/NvInfer.h
#   tools/container.sh serve WHEEL        into the Python of SGLang's image, and check that the plugin fits that SGLang
#   tools/container.sh cpu                the build environment alone, in the folder of the sources
#   tools/container.sh user               the user that everything runs as
set -euo pipefail
PYTHON=${PYTHON:-python3}
step=$1

case "$step" in
wheel)
    "$PYTHON" -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir "$2" .
    ;;
plugin)
    cmake -S plugins/pdtrim_tensorrt/library -B "$2/build" -DTENSORRT_ROOT="${TENSORRT_ROOT:?}"
    cmake --build "$2/build" --parallel 2
    install -m 0755 "$2/build/libpdtrim_tensorrt.so" "$2/libpdtrim_tensorrt.so"
    rm -rf "$2/build"
    ;;
serve)
    # --no-deps: SGLang's image has all that the plugin imports; the router and onnxruntime are pinned beside it.
    "$PYTHON" -m pip install --quiet --no-cache-dir --no-deps "$2"
    "$PYTHON" -m pip install --quiet --no-cache-dir "sglang-router==0.3.2" "onnxruntime==1.32.0" \
        "onnxruntime-extensions==0.15.2"
    "$PYTHON" -P -m pdtrim_sglang.diagnosis --check
    ;;
cpu)
    # No caches: they would stay in the image beside what was installed from them.
    PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 "$PYTHON" tools/environment.py build
    .venv/build/bin/pdtrim-deploy doctor --for build
    ;;
user)
    groupadd --gid 10001 pdtrim
    useradd --create-home --uid 10001 --gid 10001 pdtrim
    ;;
*)
    echo "unknown step $step; use wheel, plugin, serve, cpu or user" >&2
    exit 2
    ;;
esac
