# Two commands do all the set-up:
#   make quickstart    install, prepare the pictures, train the tiny default on the CPU, caption pictures it never saw
#   make test          install what the tests need, run them
# PYTHON=python3.12 picks the interpreter; VENV=DIR the environment; TORCH_INDEX=URL another index for torch's wheels
# (PyTorch's own CPU index saves some 3 GB on a machine without a GPU; docs/installation.md has its address).

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet
BIN = $(VENV)/bin

.PHONY: quickstart test lint format lock clean

quickstart: $(VENV)/.installed
	$(BIN)/python dataset/quickstart.py

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell

# The tested versions: run this in an environment where `make test` passes.
lock: $(VENV)/.installed-test
	echo '# The versions that were tested together, on Python 3.11. Made by `make lock`.' > requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|triton|cuda-|minigpt4)' >> requirements.lock

clean:
	rm -rf $(VENV) data output

$(VENV)/.installed: requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --constraint requirements.lock $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PIP) --constraint requirements.lock --editable '.[tiny]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --constraint requirements.lock --editable '.[tiny,test]'
	touch $@
