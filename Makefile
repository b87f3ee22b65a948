# Every target but help, clean and setup starts with setup, which does nothing when .venv is up to date.
PYTHON_VENV := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest
SOURCES := gspo_megatron tests tools examples setup.py

.DEFAULT_GOAL := help
.PHONY: help setup setup-peers setup-sglang setup-slurm quickstart test test-system check format bench gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv with the tested versions; run again it does nothing
	@tools/setup.sh

setup-peers:  ## make .venv-peers, where TRL runs beside us in benchmarks
	@tools/setup_peers.sh

setup-sglang:  ## make .venv-sglang, where SGLang servers run on this machine's CPU
	@tools/setup_sglang.sh

setup-slurm:  ## install SLURM for its tests: Debian's packages, as root
	@tools/setup_slurm.sh

quickstart: setup $(if $(filter sglang,$(ENGINE)),setup-sglang)  ## cold-start a small MoE, improve it with GSPO on this CPU; ENGINE=sglang: SGLang rollouts
	@examples/quickstart/run.sh

test: setup  ## unit and distributed tests (CPU, gloo)
	$(PYTEST) tests/unit --numprocesses logical --maxprocesses 4 --dist worksteal
	$(PYTEST) tests/distributed

test-system: setup  ## kills, whole programs, real SGLang servers, a real SLURM
	$(PYTEST) tests/system $(TESTS)

check: setup  ## format, lint, types, import contract
	$(PYTHON_VENV) -m ruff format --check $(SOURCES)
	$(PYTHON_VENV) -m ruff check $(SOURCES)
	$(PYTHON_VENV) -m mypy
	$(PYTHON_VENV) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: setup  ## rewrite the sources in the project's format
	$(PYTHON_VENV) -m ruff format $(SOURCES)
	$(PYTHON_VENV) -m ruff check --fix $(SOURCES)

bench: setup setup-peers setup-sglang  ## run tools/benchmark_*.py
	@tools/bench.sh

gpu-check: setup  ## on a GPU: build, run the tests marked gpu, benchmark kernels and training; else exit 2
	@tools/gpu_check.sh

clean:  ## remove build outputs and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find gspo_megatron tests tools -name __pycache__ -prune -exec rm -rf {} +
