# Two commands do everything, set-up included: `make demo` and `make test`.
PY ?= python3
TORCH ?= torch
TORCH_INDEX ?=          # name PyTorch's own index here for another build of torch (CPU, another CUDA)
BIN := .venv/bin
READY := .venv/.ready
TESTS ?= tests

.PHONY: setup demo test lint format clean

setup: $(READY)

# The stamp is written last, so an interrupted install is begun again from an empty environment. torch goes first and alone: with it there, nothing
# that follows can bring another build of it.
$(READY): pyproject.toml constraints.txt hatch_build.py certify/smoothing/noise/_noise.c
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d; call make PY=python3.12" % sys.version_info[:2])'
	test -e $@ || $(PY) -m venv --clear .venv
	rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(TORCH) $(if $(strip $(TORCH_INDEX)),--retries 0 --extra-index-url $(strip $(TORCH_INDEX)))
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo_digits.py -o runs/demo

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache
