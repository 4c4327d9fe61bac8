# syntax=docker/dockerfile:1
# Two targets. Neither image has been built: there is no Docker engine where this was written. The RUN lines are steps of
# tools/container.sh, and each of the five has run there outside a container: `wheel` in a test, in a folder of just what
# is copied; by hand `plugin` (CUDA 13.0, TensorRT 11.1's headers, nothing else copied), `serve` (in the project's own
# environment), `user` and `cpu` (as that user, from a clean clone, in a mount namespace of its own), and the CPU image's
# health check and entry point. Not tried: the base images, apt-get, the serving image's health check. hadolint is silent.
#   docker build --target serve -t pdtrim-serve:0.1.0 .     SGLang's own image with the plugin, for GPU hosts
#   docker build --target cpu   -t pdtrim-cpu:0.1.0 .       plan, build, judge and inspect bundles on a CPU
# The images are named by tag: no registry of images could be asked for their digests where this was written. Ask yours,
# once, and build by what it says:
#   docker buildx imagetools inspect lmsysorg/sglang:v0.5.23 --format '{{.Manifest.Digest}}'
#   docker build --build-arg SGLANG_IMAGE=lmsysorg/sglang@sha256:DIGEST --target serve ...
# and so for TENSORRT_IMAGE and PYTHON_IMAGE.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:25.10-py3
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY pdtrim_deploy pdtrim_deploy
COPY recipes/facts recipes/facts
COPY builders builders
COPY plugins plugins
COPY tools/container.sh tools/container.sh
RUN tools/container.sh wheel /dist

# The TensorRT plugin, against the headers, nvcc and cmake of NVIDIA's image. Its C++ compiles against the headers of
# TensorRT 10.13, 10.14, 10.16, 11.0 and 11.1; take the image whose TensorRT is that of your engines.
FROM ${TENSORRT_IMAGE} AS plugin
WORKDIR /src
COPY plugins/pdtrim_tensorrt plugins/pdtrim_tensorrt
COPY tools/container.sh tools/container.sh
ENV TENSORRT_ROOT=/opt/tensorrt-headers
RUN mkdir -p "$TENSORRT_ROOT" \
    && ln -s "/usr/include/$(uname -m)-linux-gnu" "$TENSORRT_ROOT/include" \
    && tools/container.sh plugin /dist

# The wheel registers itself under SGLang's entry-point group. The command is given by whoever starts it: see deploy/.
FROM ${SGLANG_IMAGE} AS serve
COPY tools/container.sh /opt/pdtrim/container.sh
COPY --from=plugin /dist/libpdtrim_tensorrt.so /opt/pdtrim/
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/pdtrim/container.sh serve /dist/*.whl && /opt/pdtrim/container.sh user
USER 10001:10001
WORKDIR /home/pdtrim
ENV SGLANG_PLUGINS=pdtrim HF_HUB_OFFLINE=1 HEALTH_URL=http://127.0.0.1:30000/health
HEALTHCHECK --interval=30s --timeout=30s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=25)"]

FROM ${PYTHON_IMAGE} AS cpu
# g++ compiles the packing of KV for this very CPU at first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY tools/container.sh /opt/pdtrim/container.sh
RUN /opt/pdtrim/container.sh user && install --directory --owner=10001 --group=10001 /home/pdtrim/pdtrim-deploy
COPY --chown=10001:10001 . /home/pdtrim/pdtrim-deploy
WORKDIR /home/pdtrim/pdtrim-deploy
USER 10001:10001
# PyTorch's own index of CPU builds, by --build-arg, keeps CUDA's libraries (several GB) out of the image.
ARG PIP_EXTRA_INDEX_URL=""
RUN tools/container.sh cpu
ENV PATH=/home/pdtrim/pdtrim-deploy/.venv/build/bin:$PATH
HEALTHCHECK --interval=1m --timeout=30s CMD ["pdtrim-deploy", "doctor", "--for", "build"]
ENTRYPOINT ["pdtrim-deploy"]
CMD ["--help"]
