# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or 3.12, make and g++.
# On a machine without a GPU, PyTorch's CPU wheels are smaller: point PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# The current folder must not come first on Python's path (see docs/architecture.md, "one import name").
export PYTHONSAFEPATH := 1

.PHONY: help setup demo test check format lint copy types pytest pytest-jobs pytest-commands cluster pyarrow-range soak goodput fuzz clean

help:  ## Shows the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(BIN)/.installed  ## Makes the environment with pinned dependencies.

# torch goes first: DeepSpeed's own build looks for it, and an open range would fetch another build of it.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt -e '.[teacher,eval,gpu,dev]'
	touch $@
	@echo "The environment is ready: source $(VENV)/bin/activate"

demo: setup  ## The whole road on real text, on the CPU: text -> teacher -> store -> students -> report.
	PATH="$(BIN):$$PATH" bash launch/demo.sh

test: lint types pytest pyarrow-range  ## Everything that CI runs.

format: setup  ## Rewrites the code in the one format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## Format and lint.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Type checkers cannot follow the editable mapping of the folders: check a built copy, and the benchmarks'
# scripts, which are no package, against it.
SCRIPTS := $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py))
copy: setup
	rm -rf .check build
	$(BIN)/pip install -q --no-deps --no-build-isolation --target .check .
	rm -rf build

types: copy  ## Types, on a non-editable copy.
	cd .check && MYPYPATH=.:../benchmarks $(BIN)/mypy --config-file ../pyproject.toml -p sparsekd $(SCRIPTS)

# Units and numerics run beside one another, with one thread each. Then jobs of several processes, one by one, and
# beside them whole commands, one by one: both wait more than they compute. The latter's output follows at their end.
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
pytest: setup  ## All tests but most of `make cluster`; those that need a GPU or Slurm skip with a reason (JOBS).
	@failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/numerics -n $(JOBS) --dist loadfile || failed=1; \
	$(MAKE) -j 2 pytest-jobs pytest-commands || failed=1; \
	exit $$failed

pytest-jobs: setup
	$(BIN)/python -m pytest tests/distributed tests/gpu

pytest-commands: setup
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	$(BIN)/python -m pytest tests/integration tests/slurm -m "not slurm or ci" > "$$said" 2>&1; code=$$?; \
	cat "$$said"; exit $$code

cluster: setup  ## Jobs on a Slurm cluster of two nodes on this machine; needs slurm-wlm, munge and root.
	$(BIN)/python -m pytest tests/slurm

# The oldest release that pyproject.toml allows and the newest that CI runs, in small environments of their own.
PYARROW_OLDEST := $(shell sed -nE 's/.*"pyarrow>=([0-9]+)".*/\1.0.0/p' pyproject.toml)
PYARROW_NEWEST := $(shell sed -n 's/^pyarrow==//p' constraints.txt)

$(VENV)-pyarrow-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	sed '/^pyarrow==/d' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install -q -c $(@D)/constraints.txt numpy zstandard pytest pytest-timeout pyarrow==$*
	touch $@

pyarrow-%: $(VENV)-pyarrow-%/.installed copy
	PYTHONPATH=.check $(VENV)-pyarrow-$*/bin/python -m pytest -q --noconftest \
		tests/unit/store/test_golden.py tests/unit/store/test_hostile_shard.py

pyarrow-range: pyarrow-$(PYARROW_OLDEST) pyarrow-$(PYARROW_NEWEST)  ## Stores of old, and hostile ones, under other releases of pyarrow.

.PRECIOUS: $(VENV)-pyarrow-%/.installed

# It goes on from what .soak/starts.jsonl counts: larger numbers add to it. The page keeps what older lines counted.
KILLS ?= 300
SIGNALS ?= 50
COMPETING ?= 500
SOAK_PAGE ?= benchmarks/results/soak.md
SOAK := PYTHONPATH=tests:tests/distributed:benchmarks $(BIN)/python tests/distributed/soak.py
soak: setup  ## Kills trainings and captures, or asks them to stop, at random (KILLS, SIGNALS): hours; then workers and writers of a store.
	$(SOAK) --kills $(KILLS) --signals $(SIGNALS) --page $(SOAK_PAGE)
	$(SOAK:soak.py=soak_competing.py) --workers 4 --kills $(COMPETING)
	SPARSEKD_SOAK_KILLS=160 $(BIN)/python -m pytest -s tests/unit/store/test_crash.py -k killed_writers

MINUTES ?= 10
goodput: setup  ## A training that is killed every 20 s (MINUTES): the shares of useful and of other time.
	$(SOAK) --goodput $(MINUTES) --page $(SOAK_PAGE)

CASES ?= 20000
SEED ?= 0
fuzz: setup  ## Reads 20,000 stores of a hostile stranger (CASES, SEED); keeps those that fail in .fuzz.
	$(BIN)/python tests/unit/store/fuzz_store.py --cases $(CASES) --seed $(SEED) --keep .fuzz --sentences 100

clean:  ## Removes what the targets made, but not runs.
	rm -rf $(VENV) $(VENV)-pyarrow-* .check .fuzz .soak build *.egg-info
