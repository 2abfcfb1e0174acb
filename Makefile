# make demo · make test · make check · make test-full — each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3.11
# An existing uv is used; otherwise one is installed into .uv/ from the package registry.
UV := $(shell command -v uv || echo .uv/bin/uv)
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# The environment is ours alone: what the caller's shell has active does not leak in.
unexport VIRTUAL_ENV PYTHONPATH

.PHONY: help setup demo check test test-full chaos bench format tiny-weights clean

help:
	@echo "make demo        run the whole product on real pictures, about 11 minutes on 2 cores"
	@echo "make test        quick tests, at most 8 minutes"
	@echo "make test-full   the slow tests as well, at most 40 minutes"
	@echo "make chaos       50 random kills of drivers, workers and nodes, about 15 minutes"
	@echo "make bench       every figure the project claims, measured here"
	@echo "make check       format, lint, types, import directions"
	@echo "make tiny-weights  retrain the small encoders that ship with the package, about 1 hour"

setup: .venv/.complete

.venv/.complete: requirements.lock pyproject.toml
	@command -v uv >/dev/null || [ -x .uv/bin/uv ] || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv; }
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	@echo "installing the locked packages (6.5 GB on disk)"
	$(UV) pip sync --quiet --python .venv/bin/python --compile-bytecode requirements.lock
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	@touch $@

demo: setup
	@bash infra/demo.sh

check: setup
	ruff format --check .
	ruff check .
	pyright
	lint-imports --no-cache

test: setup
	pytest -m "not slow and not gpu and not weights"

test-full: setup
	pytest -m "slow and not gpu and not weights"

chaos: setup
	CHAOS_KILLS=$${CHAOS_KILLS:-50} pytest -s tests/pipeline/engine/test_chaos.py

bench: setup
	python -m benchmarks

format: setup
	ruff format .
	ruff check --fix .

tiny-weights: setup
	python -m pipeline.tiny.train_vae --channels 4 --out pipeline/encoders/weights/tiny4
	python -m pipeline.tiny.train_vae --channels 16 --steps 1600 --out pipeline/encoders/weights/tiny16
	python -m pipeline.tiny.train_clip --seed 0 --out pipeline/encoders/weights/tiny-clip
	python -m pipeline.tiny.train_clip --seed 1 --out pipeline/encoders/weights/tiny-clip-judge

clean:
	rm -rf data runs out
