# Everything a fresh clone needs: every target makes the environments it uses first (a second when they stand).
PYTHON ?= python3
BUILD = .venv/build/bin
SERVE = .venv/serve/bin
DOCS = .venv/docs/bin
RECIPE ?= recipes/smollm2-demo.yaml
OUT ?= out/demo
HEADLINE = --requests 12 --rounds 8 --prompt-tokens 512 --output-tokens 32 --link none
CLAIMS = --requests 64 --rounds 8 --output-tokens 64 --concurrency 4 --link none
# For the page of `demo`: committed results, where they stand.
PAGE = $(addprefix --pareto ,$(wildcard benchmarks/results/kv.json)) $(addprefix --faults ,$(wildcard benchmarks/results/faults.json))
SOURCES = pdtrim_deploy builders plugins tests tools benchmarks
BENCHMARKS = $(patsubst benchmarks/%.py,%,$(filter-out benchmarks/__%,$(wildcard benchmarks/*.py)))
# Two OpenMP threads a process, waiting without spinning: test suites share few cores with the servers they start.
TEST_ENV = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
PYTEST = -m pytest --durations=5
TEST_WORKERS ?= 2

.PHONY: help setup setup-build setup-serve setup-docs setup-aiperf setup-evals lock lint format test test-unit test-unit-build test-unit-serve test-docs test-serve test-faults test-gpu-check coverage mutations soak demo demo-limited headline claims plugin gpu-check docs deploy bench clean distclean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv/build and .venv/serve from constraints/*.txt, if they do not stand yet
	@$(PYTHON) tools/environment.py build serve
	@$(BUILD)/python -m pdtrim_deploy.kvcache.cpu

setup-build:
	@$(PYTHON) tools/environment.py build

setup-serve:
	@$(PYTHON) tools/environment.py serve

setup-docs:
	@$(PYTHON) tools/environment.py docs

setup-aiperf:
	@$(PYTHON) tools/environment.py aiperf

setup-evals:
	@$(PYTHON) tools/environment.py evals

lock: setup setup-docs setup-aiperf setup-evals  ## write what is now installed in the environments back to constraints/*.txt
	$(PYTHON) tools/freeze.py build serve docs aiperf evals

lint: setup-build  ## ruff, its formatter in check mode, and mypy
	$(BUILD)/ruff check $(SOURCES)
	$(BUILD)/ruff format --check $(SOURCES)
	$(BUILD)/mypy

format: setup-build  ## let ruff rewrite the sources
	$(BUILD)/ruff check --fix $(SOURCES)
	$(BUILD)/ruff format $(SOURCES)

# All parts at once: a served test mostly waits for one process. 16 GB of memory at most; `make test-unit test-docs
# test-serve` runs them one after the other. -O: each part with its own output, when it ends.
test: setup setup-docs setup-evals  ## all tests: units, documentation, genuine SGLang workers and router on loopback
	@echo "four parts at once, each shown when it ends, the longest after about 20 minutes on 2 cores" >&2
	@$(MAKE) --no-print-directory -k -O -j 4 test-serve test-unit-build test-unit-serve test-docs

# Both environments at once: the plugin's tests import SGLang for a long time on one core.
test-unit: setup  ## the quick tests that start no SGLang server, in both environments: 4 minutes on 2 cores
	@$(MAKE) --no-print-directory -O -j 2 test-unit-build test-unit-serve UNITS="not serve and not slow"

UNITS = not serve

# Files in the order of tests/conftest.py: xdist's own begins with those of the most tests, and ends with the longest.
test-unit-build:
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BUILD)/python $(PYTEST) tests --ignore tests/pdtrim_sglang --ignore tests/docs \
	  -m "$(UNITS)" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-unit-serve:
	$(TEST_ENV) OMP_NUM_THREADS=1 $(SERVE)/python $(PYTEST) tests/pdtrim_sglang tests/kvcache/test_gpu.py -m "$(UNITS)"

test-docs: setup-docs  ## documentation, manifests against the Kubernetes schemas, the Dockerfile
	$(DOCS)/python $(PYTEST) tests/docs

# Two pairs at a time (8 GB of memory; TEST_WORKERS=1: half of it): one's start and the other's requests fill two cores.
test-serve: setup  ## the tests that start SGLang servers
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BUILD)/python $(PYTEST) tests/serving tests/integration -m serve -n $(TEST_WORKERS) \
	  --dist loadgroup --no-loadscope-reorder

coverage: setup  ## line coverage of each package by the tests that start no server; twice their time; not part of make test
	$(BUILD)/python tools/coverage_table.py

mutations: setup  ## one-line mutations of plugin, wire format and oracle: which test catches each; not part of make test
	$(BUILD)/python tools/mutations.py

test-faults: setup  ## kill, stop, cut and flood a running pair; not part of make test
	$(TEST_ENV) $(BUILD)/python $(PYTEST) tests/faults

test-gpu-check: setup  ## the parts of gpu-check that serve, on the CPU; not part of make test
	$(TEST_ENV) $(BUILD)/python $(PYTEST) tests/gpucheck -m serve

soak: setup  ## 2,000 requests, a fifth of them aborted: memory, pages and open files stay flat
	$(TEST_ENV) $(BUILD)/python $(PYTEST) tests/faults/test_soak.py --soak-requests 2000

demo: setup  ## build, serve, check and load-test the pruned SmolLM2-135M; results in out/demo
	$(BUILD)/pdtrim-deploy demo $(RECIPE) --out $(OUT) $(PAGE)

demo-limited:  ## the demo with the instructions of an older CPU: AVX2, no AVX-512, no bfloat16; in out/demolimited
	$(PYTHON) tools/limited_cpu.py $(MAKE) --no-print-directory demo OUT=out/demolimited

headline: setup  ## the demo with KV-only prefill and k4v3, decode whole: about an hour on 2 cores; results in out/headline
	$(BUILD)/pdtrim-deploy demo recipes/smollm2-headline.yaml --out out/headline $(HEADLINE) $(PAGE)

claims: setup  ## the same with both savings that the paper's v1 names, at a large loss; results in out/claims
	$(BUILD)/pdtrim-deploy demo recipes/smollm2-v1-claims.yaml --out out/claims $(CLAIMS) $(PAGE)

plugin: setup-build  ## compile the TensorRT plugin's kernels with nvcc (sm_80, 90, 100, 120) into out/plugin; fail on a spill
	$(BUILD)/python -m pdtrim_tensorrt.compile_kernels out/plugin

gpu-check: setup  ## on a machine with a GPU: run there what has not run on one; ten minutes
	$(BUILD)/pdtrim-deploy gpu-check --out benchmarks/results/gpu-check.json

docs: setup-docs  ## build the documentation into out/docs, strictly: a warning is an error
	$(DOCS)/python tools/reference.py
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --quiet --strict --site-dir out/docs

deploy: setup-build  ## write the examples in deploy/ from the code
	$(BUILD)/python tools/deploy_base.py

bench: $(addprefix bench-,$(BENCHMARKS))  ## run every benchmarks/NAME.py (one: make bench-NAME)

bench-launches: setup  # Triton lies in the environment that serves
	$(SERVE)/python benchmarks/launches.py

bench-%: setup
	$(BUILD)/python benchmarks/$*.py

readme: setup-build  ## write the tables of README and docs from benchmarks/results and, if there is one, the last demo
	$(BUILD)/python tools/readme_tables.py $(addprefix --demo ,$(wildcard $(OUT)/report/metrics.json)) $(addprefix --demolimited ,$(wildcard out/demolimited/report/metrics.json)) $(addprefix --headline ,$(wildcard out/headline/report/metrics.json)) $(addprefix --claims ,$(wildcard out/claims/report/metrics.json))

clean:  ## remove outputs and caches, keep the environments
	rm -rf out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean  ## remove the environments too
	rm -rf .venv
