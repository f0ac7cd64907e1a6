# Two commands do all set-up on a fresh machine: `make demo` and `make test`. Both leave .venv/bin/vivace.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

.PHONY: demo test lint types build format bench-setup sanitize lines clean

demo: $(STAMP)
	$(BIN)/vivace generate "red heart" "pizza" "rocket" "cat face" "dog face" "tree" "fire" "rainbow" \
		--n 2 --seed 7 --scale 4 --out demo.png
	@echo "pictures: demo.png"

test: $(STAMP) lint types
	OMP_NUM_THREADS=1 VIVACE_REQUIRE_EXT=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp')

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp')

# torch first, on its own: no other package may choose or replace it.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.22" ninja
	$(BIN)/python -m pip freeze | grep -i '^torch==' > $(VENV)/constraints.txt
	VIVACE_REQUIRE_EXT=1 $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[torch,dev]"
	touch $(STAMP)

build: $(STAMP)
	VIVACE_REQUIRE_EXT=1 $(BIN)/python setup.py -q build_ext --inplace

bench-setup: $(STAMP)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[torch,dev,diffusers,bench]"
	test -x .venv-rtx/bin/python || $(PYTHON) -m venv .venv-rtx
	.venv-rtx/bin/python -m pip install -q tensorrt-rtx==1.7.1.116 || echo "no TensorRT-RTX: its engines are not built"
	$(BIN)/python -m vivace.bench.prepare

# The C++ tests under the address and undefined-behaviour sanitizers; `make test` runs them too.
sanitize: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DVIVACE_PYTHON=OFF \
		-DVIVACE_SANITIZE=address,undefined
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --target csrc_tests
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/sanitize --output-on-failure

lines:
	@for d in engine kernels csrc python/vivace bench tests; do \
		printf '%-15s' $$d; git ls-files "$$d/*.py" "$$d/*.h" "$$d/*.inl" "$$d/*.cpp" | xargs cat | wc -l; done

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info python/vivace/_C*.so .pytest_cache .mypy_cache .ruff_cache
