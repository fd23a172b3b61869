# Every target does its own set-up, again and again without harm.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernel test-images images compare bench-node bench-xds check fmt clean

VENV     := .venv
BIN      := $(VENV)/bin
STATE    := /var/lib/redirector
SETUP    := .ci/setup
SETUP_OK := $(VENV)/.setup-ok

# Of the images: who builds (docker, podman or buildah), what on, and what the results are called.
BUILDER   = $(notdir $(firstword $(foreach b,docker podman buildah,$(shell command -v $(b)))))
BASE     := debian:12-slim
REGISTRY :=
TAG      := latest

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Debian packages, .venv, Envoy, kernel headers for bcc
	@bash $(SETUP) $(VENV) $(STATE)

demo: setup ## steer real pods through real Envoys and show it
	@$(BIN)/redirector demo

test: setup ## every test, on the real kernel, with real Envoys and real programs; some on Debian's kernel
	@bash tests/programs/setup $(STATE)/programs
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)
ifeq ($(ARGS),)
	@bash tests/kernel/setup $(STATE)/kernel
	@bash tests/kernel/boot $(STATE)/kernel $$(grep -v '^#' tests/kernel/selection)
endif

test-kernel: setup ## more of the datapath's tests on Debian's own kernel, in an emulator
	@bash tests/kernel/setup $(STATE)/kernel$(SUITE:%=-%) $(SUITE)
	@bash tests/kernel/boot $(STATE)/kernel$(SUITE:%=-%) $(ARGS)

test-images: setup ## both images, built and run as the manifests say
	@bash tests/images/setup $(STATE)/images
	@$(BIN)/pytest tests/images $(ARGS)

images: ## both images; REGISTRY=registry.example/ TAG=1.2, BUILDER=podman, BASE=another Debian 12
	@[ -n "$(BUILDER)" ] || { echo "images: error: none of docker, podman and buildah is installed" >&2; exit 1; }
	$(BUILDER) build $(ARGS) --build-arg BASE=$(BASE) -f manifests/Dockerfile --target agent -t $(REGISTRY)redirector:$(TAG) .
	$(BUILDER) build $(ARGS) --build-arg BASE=$(BASE) -f manifests/Dockerfile --target xds-server -t $(REGISTRY)redirector-xds-server:$(TAG) .

compare: setup ## the latency comparison of both modes
	@$(BIN)/redirector compare $(ARGS)

bench-node: setup ## what enrolled pods cost a node: time, memory, new connections
	@$(BIN)/python -m redirector.bench.command $(ARGS)

bench-xds: setup ## what a thousand sidecars cost the xDS server: time to the last ACK, CPU, bytes, memory
	@$(BIN)/python -m xds_server.bench.command $(ARGS)

check: setup ## lint, types, import rules, C format (changes nothing)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy redirector xds/xds_server
	@$(BIN)/mypy --config-file tests/mypy.ini tests
	@$(BIN)/lint-imports
	@clang-format --dry-run --Werror bpf/sockops/*.[ch]

fmt: setup ## put the code in its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@clang-format -i bpf/sockops/*.[ch]

clean: ## forget the virtual environment
	rm -rf $(VENV)
