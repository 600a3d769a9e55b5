# make train   trains the demo recipe with two processes on a CPU, in minutes, and writes a report
# make test    runs the test suite, but for what is long
# make test-cluster    runs the tests that are marked as long: a real SLURM, runs that are killed
# make test-versions   tries the older DeepSpeed and transformers of the range, in .versions/
# All set up what they need in $(VENV) first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NPROC  ?= 2
# $(call beside,NAME,TESTS,OTHERS): TESTS in the background, their output in .NAME.log until they are done; OTHERS on the screen
beside  = $(BIN)/python -m pytest $(2) >.$(1).log 2>&1 & other=$$!; trap "kill $$other 2>/dev/null" EXIT; \
  $(BIN)/python -m pytest $(3); here=$$?; wait $$other; there=$$?; cat .$(1).log; exit $$((here | there))

# Tests over several ranks that go into the other lane, so that both take as long
ASIDE   = $(addprefix tests/distributed/,test_equivalence.py test_loss.py test_starts.py test_unpickle.py)

.PHONY: install train test test-cluster test-versions check package format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> setting up $(VENV) (downloads PyTorch, DeepSpeed and the rest once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

data/demo/index.json: $(STAMP)
	@echo "==> preparing the demo's text: recipes/corpus -> data/demo"
	$(BIN)/relora-ds prepare recipes/corpus/english.jsonl.gz data/demo --vocab-size 1024

train: $(STAMP) data/demo/index.json
	@echo "==> training recipes/demo.yaml with $(NPROC) processes into runs/demo (run again to resume)"
	$(BIN)/relora-ds train recipes/demo.yaml --nproc $(NPROC)
	@echo "==> writing the report"
	$(BIN)/relora-ds report runs/demo

test: $(STAMP)
	@echo "==> running the test suite, in two lanes: tests over several ranks, and beside them the others"
	@$(call beside,others,tests/unit tests/integration $(ASIDE) -m "not long",tests/distributed $(ASIDE:%=--ignore=%) -m "not long")

test-cluster: $(STAMP)
	@echo "==> running what takes minutes: jobs on a SLURM cluster, which mostly wait, and beside them runs that are killed"
	@$(call beside,jobs,tests/cluster/test_slurm_jobs.py,tests -m long --ignore=tests/cluster/test_slurm_jobs.py)

test-versions: $(STAMP)
	@echo "==> the versions of the range: one story with each (downloads them once, into .versions)"
	$(BIN)/python -m pytest tests/versions/each.py

check: $(STAMP)
	@echo "==> format, lint, types, the order of the rooms"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

package: $(STAMP)
	@echo "==> building sdist and wheel, and training with the wheel in an environment of its own"
	tests/package.sh $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .versions data/demo runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .jobs.log .others.log build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
