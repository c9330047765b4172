# make demo      the main job, with real files, from Python and C++
# make check     what to run before a commit: lint, the tests of the core, and those of Python that are not slow
# make test      every test, in every language; each part also runs alone: make test-c
# make build     the library, and the Python package in .venv
# make lint      formatters, linters, and the compiler's warnings
# make install   the library, headers, CMake package and pkg-config files into PREFIX, for the libtorch of LIBTORCH=DIR,
#                of .venv if it exists, else of python3, with LIBTORCH_USE_PYTORCH=1; by default of .venv, which make
#                creates; with TORCH=0 the C library alone
# make uninstall   deletes what make install has put into PREFIX
# make torture   hard tests of saving and loading, not all in make test: kills, leaks, a soak of SECONDS=600, Miri
# make fuzz      every fuzz target of the core, SECONDS=60 each
# make miri      the core under Miri, if a nightly compiler with it is installed
# make bench     every load and save beside the reference, torch and the bare machine, in one run
# make bench-header   micro-benchmarks of the header
# make docs      the guides and the reference of both headers as HTML in out/docs, with Doxygen
# make wheel     the Python package as a wheel in out/dist, for machines without Rust
# make wheels    wheels with a compiled layer for every torch, for machines without a compiler, and the sdist
# make deb       the C library as Debian packages in out/deb; needs Debian's dpkg-dev
# make clean     deletes what was built, except .venv
#
# Each target sets up what it needs, once: .venv with the pinned torch, the build, the package in .venv.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# 0 installs the C library alone, which needs no libtorch.
TORCH   ?= 1

VENV    := .venv
PY      := $(VENV)/bin/python
STAGE   := out/prefix
# Tools from .venv (cmake, ninja, ruff, clang-format) take precedence over those of the system.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Messages of panics name source files. This removes the paths of this machine from them.
export CARGO_BUILD_RUSTFLAGS := \
    --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=cargo --remap-path-prefix=$(CURDIR)=safetensors-torch

LIBTORCH_NAMED := $(strip $(LIBTORCH) $(LIBTORCH_INCLUDE) $(LIBTORCH_LIB) $(LIBTORCH_USE_PYTORCH) $(LIBTORCH_CXX11_ABI))

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
MAJOR   := $(firstword $(subst ., ,$(VERSION)))

# The parts of make test. Those in SUITES run side by side, long ones first. test-python runs after them: it uses two
# processors itself, and some of its tests measure time or memory.
SUITES := test-accelerator test-install test-examples test-docs test-address test-thread test-torture test-faults \
    test-tsan test-cpp test-rust test-c test-fuzz

CORE_SOURCES   := Cargo.toml Cargo.lock build.rs $(shell find src cpp include -type f)
PYTHON_SOURCES := setup.py pyproject.toml $(shell find $(wildcard cmake python) -name '*.cmake' -o -name '*.map' -o -name '*.py' -o -name '*.pth' -o -path '*/cli/page/*')
# Expanded only where it is used: packages are built without tests and benches.
CPP_FILES       = benches/raw.c $(shell find cpp include tests/c tests/cpp tests/faults tests/torture tests/install tests/slow tests/accelerator tests/guesses examples -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.c')

.PHONY: build library demo install uninstall wheel wheels deb bench bench-header docs clean fuzz torture miri filesystems \
    libcurl chromium check test test-sanitizers test-python test-python-quick $(SUITES) lint lint-rust lint-python lint-cpp

build: library out/python.stamp

# --- set-up

$(VENV)/requirements.stamp: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

library: out/prefix.stamp

# The shared library with its torch layer, for the libtorch that LIBTORCH and similar variables name (see build.rs), or
# for the torch of .venv if none of them is set.
out/library.stamp: $(CORE_SOURCES) out/libtorch $(if $(LIBTORCH_NAMED),,$(VENV)/requirements.stamp)
	cargo build --release --locked --features torch
	mkdir -p out && touch $@

# Changes when one of those variables does.
out/libtorch: FORCE
	@mkdir -p out && echo '$(LIBTORCH_NAMED)' | cmp -s - $@ || echo '$(LIBTORCH_NAMED)' >$@

FORCE:

# The core alone, as a shared and as a static library for C.
out/core.stamp: $(CORE_SOURCES)
	cargo build --release --locked --target-dir target/core
	mkdir -p out && touch $@

out/python.stamp: $(CORE_SOURCES) $(PYTHON_SOURCES) $(VENV)/requirements.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	mkdir -p out && touch $@

# --- install

LIB     = $(DESTDIR)$(PREFIX)/lib
INCLUDE = $(DESTDIR)$(PREFIX)/include
CORE   := target/core/release
# The libraries that the static library needs.
SYSTEM_LIBS := -lgcc_s -lutil -lrt -lpthread -lm -ldl


SHARED := target/release/libsafetensors_torch.so
# That library contains a line that names its torch: safetensors_torch 0.1.0 built for torch 2.11.0, C++ ABI 1
BUILT_FOR = $(if $(filter-out 0,$(TORCH)),$(shell LC_ALL=C sed -n 's/.*built for torch \([0-9][^,]*\), C++ ABI \([01]\).*/\1 \2/p' $(SHARED)))

# install_library FILE NAME: installs FILE as libNAME.so, with the links by which linkers find it.
define install_library
	install -m 755 $(1) $(LIB)/lib$(2).so.$(VERSION)
	ln -sf lib$(2).so.$(VERSION) $(LIB)/lib$(2).so.$(MAJOR)
	ln -sf lib$(2).so.$(MAJOR) $(LIB)/lib$(2).so
endef
# install_pc NAME: installs a pkg-config file.
define install_pc
	sed -e 's|@VERSION@|$(VERSION)|' -e 's|@SYSTEM_LIBS@|$(SYSTEM_LIBS)|' \
	    -e 's|@TORCH_VERSION@|$(word 1,$(BUILT_FOR))|' -e 's|@CXX11_ABI@|$(word 2,$(BUILT_FOR))|' \
	    pkgconfig/$(1).pc.in >$(LIB)/pkgconfig/$(1).pc
	chmod 644 $(LIB)/pkgconfig/$(1).pc
endef

install: out/core.stamp $(if $(filter-out 0,$(TORCH)),out/library.stamp)
	install -d $(LIB)/cmake/SafetensorsTorch $(LIB)/pkgconfig $(INCLUDE)
	install -m 644 include/safetensors_torch.h $(INCLUDE)
	$(call install_library,$(CORE)/libsafetensors_torch.so,safetensors_torch_c)
	strip -g -o $(LIB)/libsafetensors_torch_c.a $(CORE)/libsafetensors_torch.a
	chmod 644 $(LIB)/libsafetensors_torch_c.a
	$(call install_pc,safetensors_torch-c)
	install -m 644 $(addprefix cmake/SafetensorsTorch,Config.cmake ConfigVersion.cmake Libtorch.cmake) \
	    $(LIB)/cmake/SafetensorsTorch
ifneq ($(TORCH),0)
	install -d $(INCLUDE)/safetensors_torch
	install -m 644 include/safetensors_torch.hpp $(INCLUDE)
	install -m 644 include/safetensors_torch/*.hpp $(INCLUDE)/safetensors_torch
	$(call install_library,$(SHARED),safetensors_torch)
	$(call install_pc,safetensors_torch)
endif

uninstall:
	rm -f $(LIB)/libsafetensors_torch.so* $(LIB)/libsafetensors_torch_c.so* $(LIB)/libsafetensors_torch_c.a \
	    $(LIB)/pkgconfig/safetensors_torch.pc $(LIB)/pkgconfig/safetensors_torch-c.pc \
	    $(INCLUDE)/safetensors_torch.h $(INCLUDE)/safetensors_torch.hpp
	rm -rf $(LIB)/cmake/SafetensorsTorch $(INCLUDE)/safetensors_torch

# The installed trees that tests, examples and the demo are built against: with torch, and the C library alone.
out/prefix.stamp: out/library.stamp out/core.stamp Makefile $(wildcard cmake/* pkgconfig/*)
	rm -rf $(STAGE) $(STAGE)-c
	$(MAKE) --no-print-directory install PREFIX=$(CURDIR)/$(STAGE) DESTDIR= TORCH=1 >/dev/null
	$(MAKE) --no-print-directory install PREFIX=$(CURDIR)/$(STAGE)-c DESTDIR= TORCH=0 >/dev/null
	touch $@

# --- demo

demo: build
	PYTHON=$(CURDIR)/$(PY) PREFIX=$(CURDIR)/$(STAGE) WORK=$(CURDIR)/out/demo examples/gpt2/run.sh

# --- tests

# Runs targets of this file side by side, see tests/suites.py.
RUN_SUITES = MAKE="$(MAKE)" $(PYTHON) tests/suites.py

test: build out/core.stamp filesystems libcurl chromium
	$(RUN_SUITES) $(SUITES) --alone test-python

check: build out/core.stamp
	$(RUN_SUITES) lint test-rust --alone test-python-quick

# The core does not use torch, so its tests do not either.
test-rust: $(VENV)/requirements.stamp
	cargo test --profile tests --locked --target-dir target/core

# The threads of the core under ThreadSanitizer, if the compiler has it.
test-tsan:
	tests/rust/tsan.sh

# The corpus of the fuzz targets, once. fuzz/README.md says more.
test-fuzz:
	RUSTFLAGS="--cfg fuzzing" cargo test --quiet --locked --no-default-features --manifest-path fuzz/Cargo.toml \
	    --target-dir target/fuzz-replay

test-c: out/core.stamp
	tests/c/run.sh target/core/release

# Makes every system call and every allocation of a save fail.
test-faults: out/core.stamp
	tests/faults/run.sh target/core/release

test-torture: out/core.stamp filesystems
	tests/torture/run.sh target/core/release quick

# SECONDS is the length of the soak, KILLS the number of kills for each kind of target.
torture: out/core.stamp out/python.stamp filesystems
	PYTHON=$(CURDIR)/$(PY) SOAK=$(or $(SECONDS),600) KILLS=$(or $(KILLS),500) tests/torture/run.sh target/core/release
	$(MAKE) --no-print-directory miri

# Installs the programs that make the filesystems of tests/torture/power.c, which skips those that are missing.
filesystems:
	export PATH="$$PATH:/usr/sbin:/sbin"; \
	if command -v mkfs.xfs && command -v mkfs.btrfs; then exit; fi >/dev/null; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then exit; fi; \
	apt-get install -qq -y xfsprogs btrfs-progs >/dev/null || \
	    { apt-get update -qq && apt-get install -qq -y xfsprogs btrfs-progs >/dev/null; } || \
	    echo "xfsprogs and btrfs-progs cannot be installed: XFS and Btrfs are not tested" >&2

miri:
	tests/rust/miri.sh

TORCH_DIR = $(shell $(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')

test-cpp: library
	cmake -S tests/cpp -B out/tests-cpp -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_PREFIX_PATH="$(CURDIR)/$(STAGE);$(TORCH_DIR)" >/dev/null
	cmake --build out/tests-cpp --parallel
	ctest --test-dir out/tests-cpp --output-on-failure

# C and C++ with all of our code instrumented, if the compilers have the sanitizers.
test-sanitizers: test-address test-thread

test-address test-thread: test-%: out/sanitizers/%.stamp
	tests/sanitizers/run.sh test $*

out/sanitizers/address.stamp out/sanitizers/thread.stamp: out/sanitizers/%.stamp: out/prefix.stamp \
    $(wildcard tests/sanitizers/* tests/cpp/*)
	tests/sanitizers/run.sh build $*

# Installs what examples/cpp/s3 is built with, which tests/examples.sh skips if it is missing.
libcurl:
	if command -v curl-config >/dev/null; then exit; fi; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then exit; fi; \
	apt-get install -qq -y libcurl4-openssl-dev >/dev/null || \
	    { apt-get update -qq && apt-get install -qq -y libcurl4-openssl-dev >/dev/null; } || \
	    echo "libcurl4-openssl-dev cannot be installed: examples/cpp/s3 is not tested" >&2

test-examples: build libcurl
	PYTHON=$(CURDIR)/$(PY) PREFIX=$(CURDIR)/$(STAGE) C_PREFIX=$(CURDIR)/$(STAGE)-c WORK=$(CURDIR)/out/examples \
	    tests/examples.sh

# Installs the browser of tests/python/test_cli_view_browser.py, which skips if it is missing.
chromium:
	if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then exit; fi; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then exit; fi; \
	install="apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core"; \
	$$install >/dev/null || { apt-get update -qq && $$install >/dev/null; } || \
	    echo "chromium cannot be installed: the pages of the shell command are not tested in a browser" >&2

# Runs the programs in the guides.
test-docs: build
	PYTHON=$(CURDIR)/$(PY) PREFIX=$(CURDIR)/$(STAGE) C_PREFIX=$(CURDIR)/$(STAGE)-c \
	    WORK=$(CURDIR)/out/docs-programs tests/docs.sh

# Installs the library in every supported way, and builds programs with it.
test-install: out/library.stamp out/core.stamp out/python.stamp
	MAKE="$(MAKE)" PYTHON=$(CURDIR)/$(PY) WORK=$(CURDIR)/out/install tests/install/run.sh

# Tests with the mark "alone" measure time, memory or reads; the others share two processes. test-python-quick leaves out those
# with the mark "slow".
PYTEST := $(PY) -m pytest --quiet
# A test loads the installed library beside the package.
test-python: library
test-python test-python-quick: out/python.stamp
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not alone$(if $(filter %-quick,$@), and not slow)"
	$(PYTEST) -m alone $$(grep -l mark.alone tests/python/test_*.py)

# Transfers to and from a simulated device that runs everything late. A separate process, because the device changes torch.
test-accelerator: out/python.stamp
	$(PYTEST) tests/accelerator tests/python/test_device.py
	$(PY) tests/gpu/run.py --device testaccel --check --only 'names=|dtype=|tensors are loaded|late' --directory out/gpu-check

# --- the rest

fuzz:
	fuzz/run.sh $(or $(SECONDS),60)

# Downloads the headers of each torch and C libraries, about 200 MB, and compilers for aarch64; needs no torch.
PACKAGING := out/packaging
wheels: $(PACKAGING)/requirements.stamp
	PATH=$(CURDIR)/$(PACKAGING)/bin:$$PATH $(PACKAGING)/bin/python packaging/wheels.py

$(PACKAGING)/requirements.stamp: packaging/requirements.txt
	test -x $(PACKAGING)/bin/python || $(PYTHON) -m venv $(PACKAGING)
	$(PACKAGING)/bin/python -m pip install --quiet --disable-pip-version-check -r packaging/requirements.txt
	touch $@

wheel: $(PACKAGING)/requirements.stamp
	SAFETENSORS_TORCH_AOT=0 $(PACKAGING)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    --wheel-dir out/dist .

deb:
	$(PYTHON) packaging/debian/build.py

$(VENV)/bench.stamp: benches/requirements.txt $(VENV)/requirements.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r benches/requirements.txt
	touch $@

# BENCH: options of benches/bench.py, such as BENCH=--quick or BENCH="--docs docs/performance.md".
bench: build $(VENV)/bench.stamp
	$(PY) benches/bench.py $(BENCH)

# Fails if a public name has no documentation or a link has no target.
docs:
	command -v doxygen >/dev/null || if test "$$(id -u)" = 0; then \
	    apt-get install -qq -y doxygen >/dev/null || { apt-get update -qq && apt-get install -qq -y doxygen >/dev/null; }; \
	else \
	    echo "make docs needs doxygen: install it first, as root with apt-get install doxygen" >&2; exit 1; \
	fi
	rm -rf out/docs
	mkdir -p out
	doxygen docs/Doxyfile

bench-header:
	cargo bench --locked --target-dir target/core --bench header

lint: lint-rust lint-python lint-cpp

lint-rust: out/library.stamp
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --quiet --release --locked --all-targets --features torch -- -D warnings
	cargo clippy --quiet --release --locked --all-targets --target-dir target/core -- -D warnings
	RUSTFLAGS="--cfg fuzzing" cargo clippy --quiet --locked --all-targets --no-default-features \
	    --manifest-path fuzz/Cargo.toml --target-dir target/fuzz-replay -- -D warnings

lint-python: $(VENV)/requirements.stamp
	ruff check --quiet .
	ruff format --check .
	$(PY) tests/tree.py
	$(PY) tests/layers.py

# The compiler's warnings of each file of the C++ layer, and of one that includes the public headers. layer.cpp includes
# all other files.
LAYER_SOURCES := $(filter-out cpp/layer.cpp,$(shell find cpp -name '*.cpp'))
WARNINGS      := out/warnings/safetensors_torch.stamp $(LAYER_SOURCES:%.cpp=out/warnings/%.stamp)

lint-cpp: $(VENV)/requirements.stamp
	clang-format --dry-run -Werror $(CPP_FILES)
	test "$$(grep -c '^#include' cpp/layer.cpp)" = $(words $(LAYER_SOURCES)) || \
	    { echo "cpp/layer.cpp: does not include every other file of cpp/" >&2; exit 1; }
	$(MAKE) --no-print-directory --silent -j2 $(WARNINGS)

$(WARNINGS): tests/warnings.sh $(VENV)/requirements.stamp $(shell find src/bridge -type f) | out/library.stamp
out/warnings/safetensors_torch.stamp:
	tests/warnings.sh - $@
out/warnings/%.stamp: %.cpp
	tests/warnings.sh $< $@

-include $(WARNINGS:.stamp=.d)

clean:
	rm -rf target out build dist
