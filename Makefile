# Two commands do everything on a fresh machine with Python 3.11, 3.12 or 3.13:
#   make demo    co-trains on the embedded data and shows the results in ./demo
#   make test    runs the tests
# make demo ARGS=--config.seed=1 passes settings on.
# Each makes its own virtual environment from this folder's files, with the tested versions.

PYTHON ?= $(firstword $(foreach v,python3.12 python3.11 python3.13 python3,$(if $(shell $(v) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo ok),$(v))))
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv-$(TAG)
BIN := $(VENV)/bin
WORKDIR ?= demo
ARGS ?=

.PHONY: demo test test-fast lint venv clean

# What the tests need, too. The demo needs less.
venv: $(VENV)/.test

$(VENV)/.train: setup.py constraints/$(TAG).txt
	@test -n "$(TAG)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@echo "Installing into $(VENV), about 2.7 GB, two thirds of it TensorFlow's. It takes a minute or two and says nothing."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/$(TAG).txt --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --constraint constraints/$(TAG).txt --editable '.[test]'
	touch $@

constraints/.txt:
	@echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12 ..."; exit 2

demo: $(VENV)/.train
	JAX_PLATFORMS=cpu $(BIN)/python -m cover_jax.main --config=configs/digits_cover.py --workdir=$(WORKDIR) $(ARGS)

# The tests of a file run in one process: they share what it trained and compiled.
test: venv lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every layer once, and one run from the command line to the report.
FAST := $(addprefix tests/test_,mixture.py clips.py frame_index.py loader.py heads.py checkpoints.py \
  main.py::test_run_leaves_what_it_says main.py::test_import_needs_no_tensorflow)

test-fast: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv-* demo
