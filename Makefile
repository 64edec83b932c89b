# Each target sets itself up: a bare clone with Python 3.11 or newer is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := onnx,openvino,tensorrt-rtx,triton,face,serve,serve-postgresql,serve-s3,serve-ray,serve-traces,train,dev
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install check test demo

help:
	@echo "make install   create $(VENV) and install the toolkit with its extras"
	@echo "make check     ruff, formatting and mypy"
	@echo "make test      make check, then every test"
	@echo "make demo      checkpoint -> bundle -> engines -> verification -> demo/video.mp4; SERVE=1: then a server"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A test file stays with one worker, which makes its fixtures once; tests run with one thread each (conftest.py).
test: check
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

demo: $(STAMP)
	$(BIN)/proteus-deploy demo --output-dir demo $(if $(SERVE),--serve)
