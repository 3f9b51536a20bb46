.PHONY: install format lint test check bench demo

install:  ## editable, with the torch of this environment, or a new one where there is none
	pip install "torch>=2.10" ninja "pybind11>=3" "setuptools>=70.1"
	pip install --no-build-isolation -e '.[dev]'

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(shell git ls-files -co --exclude-standard 'csrc/*')

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(shell git ls-files -co --exclude-standard 'csrc/*')

test:
	pytest

check:
	python -m dynmm_kernels check

bench:
	pytest benchmarks/ --benchmark-only

demo:
	python -m dynmm_kernels demo
