# `make demo` and `make test` do all the set-up themselves, in .venv; a second run costs seconds.
PYTHON ?= python3
VENV := .venv/bin
CUDA_PACKAGES := nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
PYRIGHT := pyright==1.1.414
CUDA_COMPILER := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88

.PHONY: help demo test soak lint types format build docs installs kernels emulator-asan fuzz gpu-check clean

help:
	@echo "make demo           set up, then a short conversation with the shipped model"
	@echo "make test           set up, then run the tests"
	@echo "make soak           20 minutes of 500 unruly clients against the server, then a look at what is left"
	@echo "make lint           ruff, clang-format, and the rules kernels are held to"
	@echo "make types          pyright over the package"
	@echo "make format         let ruff and clang-format rewrite the sources"
	@echo "make build          set up and compile; TOKENSPEED_CUDA=1 forces the CUDA kernels, 0 forbids them"
	@echo "make docs           write the pages that come from the code: docs/configuration.md, docs/api.md"
	@echo "make installs       install the package in every way, in fresh environments of each Python that is found"
	@echo "make kernels        compile every CUDA kernel for sm_90a and hold it to its budget (no GPU needed)"
	@echo "make emulator-asan  the emulator's tests under AddressSanitizer"
	@echo "make fuzz           10^8 random operations on the prefix cache under sanitizers, 10^5 changed bodies on the server, two hours of lives with hardly any memory, and all tests with every case that make test thins out, and with fresh inputs"
	@echo "make gpu-check      tests and benchmarks of the kernels on this machine's GPU, within ten minutes"

.venv/installed: requirements.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "TokenSpeed needs Python 3.11 or later: $(PYTHON) was not found."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "TokenSpeed needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "TokenSpeed needs a C++ compiler: install g++, or set CXX."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv)."; exit 1; }
	@echo "setting up .venv (torch and the other packages of requirements.txt; a few minutes the first time)"
	@test -x $(VENV)/python || $(PYTHON) -m venv .venv
	@$(VENV)/python -m pip install --disable-pip-version-check --progress-bar on $$(grep ^torch requirements.txt)
	@$(VENV)/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	@$(VENV)/python -c 'import sys; from tools.cuda_paths import cuda_include_dirs as d; sys.exit(not d())' || \
		$(VENV)/python -m pip install --disable-pip-version-check $(CUDA_PACKAGES)
	@touch $@

# Ninja finds out what is stale; this always asks it.
build: .venv/installed
	@test "$(TOKENSPEED_CUDA)" != 1 || $(VENV)/python -c \
		'import sys; from tools.cuda_paths import find_nvcc; sys.exit(find_nvcc() is None)' || \
		$(VENV)/python -m pip install --disable-pip-version-check $(CUDA_PACKAGES) $(CUDA_COMPILER)
	@$(VENV)/python setup.py --quiet build_ext --inplace

demo: build
	@$(VENV)/python -m examples.conversation

test: build
	@$(VENV)/python tools/run_tests.py

soak: build
	@$(VENV)/python -m tests.server.soak

lint: .venv/installed
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@git ls-files '*.cpp' '*.cu' '*.h' | xargs $(VENV)/clang-format --dry-run --Werror
	@$(VENV)/python tools/lint_kernels.py

format: .venv/installed
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .
	@git ls-files '*.cpp' '*.cu' '*.h' | xargs $(VENV)/clang-format -i

types: .venv/installed
	@$(VENV)/python -m pip install --quiet --disable-pip-version-check $(PYRIGHT)
	@$(VENV)/pyright

docs: build
	@$(VENV)/python tools/make_reference.py

installs: .venv/installed
	@$(VENV)/python tools/try_installs.py --python $$(for v in 3.11 3.12 3.13 3.14; do command -v python$$v; done)

kernels: .venv/installed
	@$(VENV)/python tools/compile_kernels.py

emulator-asan: .venv/installed
	@$(VENV)/python tools/build_emulator.py --asan

fuzz: build
	@$(VENV)/python -m tests.cache.fuzz --operations 100000000
	@$(VENV)/python -m tests.server.fuzz --bodies 100000
	@$(VENV)/python -m tests.engine.fuzz --seconds 7200
	@$(VENV)/python -m pytest --every-case

gpu-check:
	@python3 tools/gpu_check.py

clean:
	rm -rf build .venv tokenspeed/*.so
