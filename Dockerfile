# Two targets. Neither has been built yet: there is no Docker engine where this was written.
#   docker build --target serve -t pdtrim-serve .     SGLang's own image with the plugin, for GPU hosts
#   docker build --target cpu   -t pdtrim-cpu .       both environments on a CPU: what `make demo` uses

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY pdtrim_deploy pdtrim_deploy
COPY builders builders
COPY plugins plugins
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# The wheel registers itself under SGLang's entry-point group; start the workers as the README shows.
FROM lmsysorg/sglang:v0.5.23 AS serve
COPY --from=wheel /dist/*.whl /tmp/
RUN pip install --no-cache-dir --no-deps /tmp/*.whl && rm /tmp/*.whl \
    && useradd --create-home --uid 10001 pdtrim
USER pdtrim
WORKDIR /home/pdtrim
ENV SGLANG_PLUGINS=pdtrim

FROM python:3.11-slim AS cpu
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libnuma1 make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 pdtrim
COPY --chown=pdtrim . /home/pdtrim/pdtrim-deploy
USER pdtrim
WORKDIR /home/pdtrim/pdtrim-deploy
RUN make setup
CMD ["make", "demo"]
