# make demo      the main job, with real files, from Python and C++
# make test      every test, in every language
# make build     the library, and the Python package in .venv
# make lint      formatters, linters, and the compiler's warnings
# make install   the library, headers and CMake package into PREFIX; with TORCH=0 the C library alone
# make bench     every load and save beside the reference, torch and the bare machine, in one run
# make bench-header   micro-benchmarks of the header
# make wheel     the Python package as a wheel in out/dist, for machines without Rust
# make clean     what was built; .venv stays
#
# Each does its own set-up, once: .venv with the pinned torch, the build, the package in .venv.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# 0 installs the C library alone, which needs no libtorch.
TORCH   ?= 1

VENV    := .venv
PY      := $(VENV)/bin/python
STAGE   := out/prefix
# Tools that pip installed (cmake, ninja, ruff, clang-format) are found before others.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
MAJOR   := $(firstword $(subst ., ,$(VERSION)))

CORE_SOURCES   := Cargo.toml Cargo.lock build.rs $(shell find src cpp include -type f)
PYTHON_SOURCES := setup.py pyproject.toml $(shell find python -name '*.py')
CPP_FILES      := benches/raw.c $(shell find cpp include tests/c tests/cpp tests/accelerator examples -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.c')

.PHONY: build demo test bench bench-header lint install clean wheel test-rust test-tsan test-c test-cpp test-python test-accelerator test-examples library

build: library out/python.stamp

# --- set-up

$(VENV)/requirements.stamp: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

library: out/prefix.stamp

# The shared library with its torch layer.
out/library.stamp: $(CORE_SOURCES) $(VENV)/requirements.stamp
	cargo build --release --locked
	mkdir -p out && touch $@

# The core alone: a shared library for C, and the static one.
out/core.stamp: $(CORE_SOURCES)
	cargo build --release --locked --no-default-features --target-dir target/core
	mkdir -p out && touch $@

out/python.stamp: $(CORE_SOURCES) $(PYTHON_SOURCES) $(VENV)/requirements.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	mkdir -p out && touch $@

# --- install

ifeq ($(TORCH),0)
SHARED := target/core/release/libsafetensors_torch.so
HEADERS := include/safetensors_torch.h
install: out/core.stamp
else
SHARED := target/release/libsafetensors_torch.so
HEADERS := include/safetensors_torch.h include/safetensors_torch.hpp
install: out/library.stamp out/core.stamp
endif

install:
	install -d $(DESTDIR)$(PREFIX)/lib/cmake/safetensors_torch $(DESTDIR)$(PREFIX)/include
	install -m 644 $(HEADERS) $(DESTDIR)$(PREFIX)/include
ifneq ($(TORCH),0)
	install -d $(DESTDIR)$(PREFIX)/include/safetensors_torch
	install -m 644 include/safetensors_torch/*.hpp $(DESTDIR)$(PREFIX)/include/safetensors_torch
endif
	install -m 755 $(SHARED) $(DESTDIR)$(PREFIX)/lib/libsafetensors_torch.so.$(VERSION)
	ln -sf libsafetensors_torch.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libsafetensors_torch.so.$(MAJOR)
	ln -sf libsafetensors_torch.so.$(MAJOR) $(DESTDIR)$(PREFIX)/lib/libsafetensors_torch.so
	install -m 644 target/core/release/libsafetensors_torch.a $(DESTDIR)$(PREFIX)/lib
	install -m 644 cmake/*.cmake $(DESTDIR)$(PREFIX)/lib/cmake/safetensors_torch

# The installed trees that tests, examples and the demo are built against: with torch, and the C library alone.
out/prefix.stamp: out/library.stamp out/core.stamp $(wildcard cmake/*)
	rm -rf $(STAGE) $(STAGE)-c
	$(MAKE) --no-print-directory install PREFIX=$(CURDIR)/$(STAGE) DESTDIR= TORCH=1 >/dev/null
	$(MAKE) --no-print-directory install PREFIX=$(CURDIR)/$(STAGE)-c DESTDIR= TORCH=0 >/dev/null
	touch $@

# --- demo

demo: build
	PYTHON=$(CURDIR)/$(PY) PREFIX=$(CURDIR)/$(STAGE) WORK=$(CURDIR)/out/demo examples/gpt2/run.sh

# --- tests

test: test-rust test-tsan test-c test-cpp test-examples test-python test-accelerator

# The core has no torch in it, so neither have its tests.
test-rust: $(VENV)/requirements.stamp
	cargo test --release --locked --no-default-features --target-dir target/core

# The threads of the core, under ThreadSanitizer where the compiler has it.
test-tsan:
	tests/rust/tsan.sh

test-c: out/core.stamp
	tests/c/run.sh target/core/release

TORCH_DIR = $(shell $(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')

test-cpp: library
	cmake -S tests/cpp -B out/tests-cpp -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_PREFIX_PATH="$(CURDIR)/$(STAGE);$(TORCH_DIR)" >/dev/null
	cmake --build out/tests-cpp --parallel
	ctest --test-dir out/tests-cpp --output-on-failure

test-examples: build
	PYTHON=$(CURDIR)/$(PY) PREFIX=$(CURDIR)/$(STAGE) C_PREFIX=$(CURDIR)/$(STAGE)-c WORK=$(CURDIR)/out/examples \
	    tests/examples.sh

test-python: out/python.stamp
	$(PY) -m pytest

# Transfers to and from devices, with one that does everything late. A process of its own: it changes torch.
test-accelerator: out/python.stamp
	$(PY) -m pytest tests/accelerator tests/python/test_device.py
	$(PY) tests/gpu/run.py --device testaccel --check --only 'names=|dtype=|tensors are loaded|late' --folder out/gpu-check

# --- the rest

wheel: $(VENV)/requirements.stamp
	SAFETENSORS_TORCH_AOT=0 $(PY) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    --wheel-dir out/dist .

$(VENV)/bench.stamp: benches/requirements.txt $(VENV)/requirements.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r benches/requirements.txt
	touch $@

# BENCH: options of benches/bench.py, such as BENCH=--quick or BENCH="--docs docs/performance.md".
bench: build $(VENV)/bench.stamp
	$(PY) benches/bench.py $(BENCH)

bench-header:
	cargo bench --locked --no-default-features --target-dir target/core --bench header

lint: out/library.stamp out/core.stamp
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo clippy --release --locked --all-targets --no-default-features --target-dir target/core -- -D warnings
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	tests/warnings.sh

clean:
	rm -rf target out build dist
