# Each command installs what it needs first:
#   make quickstart    prepare the pictures, train the tiny default on the CPU, caption pictures it never saw
#   make check         the linters and the quick tests, for every commit: about three minutes
#   make test          the linters and all tests: about 8 minutes
#   make lint          let ruff correct and format the code
#   make clean         remove the environments that make created, and nothing else
#   make rehearsal     try out how the data of stage 1 is made, with img2dataset in its own environment: two minutes
# PYTHON=python3.12 picks the interpreter; VENV=DIR the environment; TORCH_INDEX=URL another index for torch's wheels
# (PyTorch's own CPU index saves some 3 GB on a machine without a GPU; docs/installation.md has its address).

# Some machines set it. Then each of the many processes of the tests would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV ?= .venv
# Without the filter, setuptools warns in a box of asterisks of what an editable installation means.
PIP = PYTHONWARNINGS='ignore:Editable installation' $(VENV)/bin/pip install --quiet
BIN = $(VENV)/bin
IMG2DATASET_VENV = .venv-img2dataset
# Three processes also for two cores, because some tests wait. The tests of a file stay together, for the models that
# they share.
PYTEST = $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart check test style rehearsal lint lock clean

quickstart: $(VENV)/.installed
	$(BIN)/python dataset/quickstart.py

check: style
	$(PYTEST) -m "not slow"

test: style
	$(PYTEST)

style: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

rehearsal: $(VENV)/.installed-test $(IMG2DATASET_VENV)/.installed
	IMG2DATASET=$(IMG2DATASET_VENV)/bin/img2dataset $(BIN)/python -m pytest tests/dataset/test_rehearsal.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell

# The tested versions: run this in an environment where `make test` passes.
lock: $(VENV)/.installed-test
	echo '# The versions that were tested together, on Python 3.11. Made by `make lock`.' > requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|triton|cuda-|minigpt4)' >> requirements.lock

# Removes the environments that make created. What was downloaded, prepared or trained is not make's to remove.
clean:
	@for env in "$(VENV)" "$(IMG2DATASET_VENV)"; do \
		if [ -e "$$env/.made-by-make" ]; then rm -rf "$$env" && echo "Removed $$env."; \
		elif [ -e "$$env" ]; then echo "Kept $$env: it has no mark of make's. Remove it by hand."; fi; done
	@for folder in data output; do [ ! -e $$folder ] || \
		echo "Kept $$folder/, with the pictures and checkpoints in it. Remove it by hand."; done

$(VENV)/.installed: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
		f"Python 3.11 or newer is needed; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 …")'
	@[ -e "$(VENV)" ] || { mkdir -p "$(VENV)" && touch "$(VENV)/.made-by-make"; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the rest into $(VENV): a few minutes, 7 GB on Linux."
	$(PIP) --upgrade pip
	$(if $(TORCH_INDEX),$(PIP) --constraint requirements.lock --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) --constraint requirements.lock --editable '.[tiny]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --constraint requirements.lock --editable '.[tiny,test]'
	touch $@

# img2dataset pins older versions of webdataset and pandas than ours.
$(IMG2DATASET_VENV)/.installed:
	@[ -e "$(IMG2DATASET_VENV)" ] || { mkdir -p "$(IMG2DATASET_VENV)" && touch "$(IMG2DATASET_VENV)/.made-by-make"; }
	$(PYTHON) -m venv $(IMG2DATASET_VENV)
	$(IMG2DATASET_VENV)/bin/pip install --quiet img2dataset==1.47.0
	touch $@
