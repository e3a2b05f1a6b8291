# A front for CMake's presets: make help
# PRESET=release builds for any processor of this kind, PRESET=debug with assertions; JOBS=1 takes one core;
# WERROR=ON treats warnings as errors, TARGETS='kvreplay_cli test_policy' builds only these,
# CMAKE_ARGS=-DKVREPLAY_NATIVE=ON sets what the preset does not.
PRESET ?= release-native
PREFIX ?= /usr/local
JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
WERROR ?= OFF
TARGETS ?=
CMAKE_ARGS ?=
RUNS ?= 10000

# Checkouts in different folders share what ccache holds.
export CCACHE_BASEDIR := $(CURDIR)

# Given on every run, so that a ccache which comes or goes is noticed; sccache and others through the environment.
configure = cmake --preset $(1) --log-level=WARNING -DKVREPLAY_WERROR=$(WERROR) \
  -DCMAKE_CXX_COMPILER_LAUNCHER="$${CMAKE_CXX_COMPILER_LAUNCHER-$$(command -v ccache)}" \
  $(CMAKE_ARGS)
compile = cmake --build --preset $(1) --parallel $(JOBS) $(addprefix --target ,$(TARGETS))

prefix = $(abspath $(patsubst ~/%,$(HOME)/%,$(PREFIX)))

.PHONY: build test test-hf demo report-environment capture-environment bench check-format format tidy fuzz sanitize install clean help setup
.DEFAULT_GOAL := build

build: setup ## Install what is missing and build, tuned for this processor (the default)
	@$(call configure,$(PRESET))
	@$(call compile,$(PRESET))
	@! test -x build/$(PRESET)/kvreplay || echo "kvreplay is here: $(CURDIR)/build/$(PRESET)/kvreplay"

test: build ## Run the tests on all cores
	@ctest --preset $(PRESET) --parallel $(JOBS)

# Builds the program alone, without the tests.
demo: setup ## Capture the demo model on the bundled prompts and replay the policies: out/demo/
	@$(call configure,$(PRESET))
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target kvreplay_cli
	@scripts/demo.sh build/$(PRESET)/kvreplay "$(PWD)"

report-environment: ## Make the Python environment that reports are drawn with (docs/report.md)
	@scripts/make-report-environment.sh

capture-environment: ## Make the Python environment for captures from Hugging Face (docs/capture.md)
	@scripts/make-capture-environment.sh

# In build/, so that the environment people capture with stays as it is. KVREPLAY lets the tests run the program.
test-hf: setup ## Compare captures by both roads, run the tests of tracer/huggingface
	@$(call configure,$(PRESET))
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target kvreplay_cli
	@scripts/make-capture-environment.sh build/capture-environment
	@build/capture-environment/bin/python tracer/huggingface/compare_captures.py build/$(PRESET)/kvreplay
	@build/capture-environment/bin/python tracer/huggingface/disk_space.py --check docs/capture.md
	@cd tracer/huggingface && KVREPLAY=$(CURDIR)/build/$(PRESET)/kvreplay PYTHONPATH=. $(CURDIR)/build/capture-environment/bin/python -m pytest -q -p no:cacheprovider
	@build/capture-environment/bin/python tracer/huggingface/check_architectures.py

check-format: setup-format ## Name what clang-format would change
	@scripts/sources.sh '*.h' '*.cpp' | xargs -0 clang-format --dry-run --Werror

format: setup-format ## Let clang-format change it
	@scripts/sources.sh '*.h' '*.cpp' | xargs -0 clang-format -i

# Not release-native: what clang-tidy says should not depend on the processor it runs on.
tidy: setup-tidy ## Run clang-tidy on the sources
	@$(call configure,release)
	@scripts/tidy.sh build/release $(JOBS)

fuzz: setup-fuzz ## Run every fuzz target 10,000 times on its corpus (RUNS=...)
	@$(call configure,fuzz)
	@$(call compile,fuzz) --target tests/fuzz/all
	@scripts/fuzz.sh build/fuzz $(RUNS) $(JOBS)

sanitize: setup ## Run the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(call configure,sanitize)
	@$(call compile,sanitize)
	@ctest --preset sanitize --parallel $(JOBS)

# REFERENCE is a checkout of the authors' code and PYTHON a Python with PyTorch; LONG=1 takes 17 GB of disk.
bench: setup ## Measure what docs/performance.md claims (REFERENCE=dir PYTHON=python LONG=1)
	@$(call configure,$(PRESET))
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target kvreplay_cli
	@scripts/bench.py --kvreplay build/$(PRESET)/kvreplay $(if $(REFERENCE),--reference $(REFERENCE)) \
	  $(if $(PYTHON),--python $(PYTHON)) $(if $(LONG),--long) $(if $(wildcard build/mpi/kvreplay),--mpi build/mpi/kvreplay)

# Without the tests.
install: setup ## Install program, library, manual, docs and completions (PREFIX=/usr/local)
	@$(call configure,$(PRESET))
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target kvreplay_cli --target kvreplay_descriptions
	@cmake --install build/$(PRESET) --prefix "$(prefix)"
	@echo "kvreplay is installed: $(prefix)/bin/kvreplay"

clean: ## Remove build/
	@rm -rf build

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-20s %s\n", $$1, $$2}'

setup:
	@scripts/install-dependencies.sh

setup-%:
	@scripts/install-dependencies.sh --$*
