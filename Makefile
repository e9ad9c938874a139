# make demo    train, measure and look at a small Mask R-CNN        make lab    open the book's notebooks in JupyterLab
# make test    the whole test suite                                 make book   build the book into _build/html
# make bench   measure speed beside torchvision                     make lint   check the style
# make clean   remove what was built (not .venv, not runs)          make torture  hostile input by the million, long
#
# Every target sets up .venv the first time, from constraints.txt. Options: make demo ARGS="--seed 1",
# make test ARGS="-k boxes", PYTHON=python3.12 to choose the interpreter, and TORCH_INDEX=... for another package index
# to take torch and torchvision from, such as PyTorch's own of builds without CUDA, which saves gigabytes.

PYTHON ?= python3
PROCESSES ?= 2
TORCH_INDEX ?=
BENCH ?= ops model pipeline guards ops_cuda
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOG := $(VENV)/setup.log
# On a failed step: the end of what it printed, and where the rest is.
OR_SAY = >> $(LOG) 2>&1 || { tail -n 25 $(LOG); echo "Setting up failed. All of it is in $(LOG)."; exit 1; }

.PHONY: help demo test lab book bench sanitize torture lint clean
help:
	@sed -n 's/^# make/make/p' Makefile

# Two processes with a thread each are faster than one with two: layers this small do not divide well among threads.
demo: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --local-addr=localhost --nproc-per-node=$(PROCESSES) \
	  -m mrcnn_edu demo $(ARGS)

test: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: $(VENV)/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find book -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -exec $(BIN)/nbstripout --keep-id --verify {} +

# Some half an hour, on an idle machine. The longer ones, such as BENCH=worker_memory, say themselves how they are run.
bench: $(VENV)/.ready
	@set -e; for name in $(BENCH); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py $(ARGS); done

# The op tests with the C++ part built for AddressSanitizer and UBSan.
sanitize: $(VENV)/.ready
	@$(BIN)/python csrc/sanitize.py $(ARGS)

# The figures go to benchmarks/results/torture.md; ARGS="masks --minutes 4" goes on with a part of it.
torture: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python tests/torture $(ARGS)

lab: $(VENV)/.book
	@$(BIN)/jupyter lab --notebook-dir=book $(ARGS)

# Jupyter Book's cache knows the notebooks but not the package they import, so it goes whenever that has changed.
book: $(VENV)/.book
	@mkdir -p _build
	@find mrcnn_edu csrc -type f -not -name '*.pyc' -exec cksum {} + 2>/dev/null | sort > _build/sources.new
	@cmp -s _build/sources.new _build/sources || rm -rf _build/.jupyter_cache
	@mv _build/sources.new _build/sources
	@rm -rf _build/.doctrees # links between pages of different age break; reading them all again is quick
	@echo "Executing the chapters that have changed, a minute or two each ..."
	@{ OMP_NUM_THREADS=1 $(BIN)/jupyter-book build . -n -W --keep-going 2>&1; echo $$? > _build/status; } \
	  | tee _build/book.log | awk '/: Executed notebook in/ { sub(/.*\//, ""); sub(/\.ipynb: Executed notebook in/, ":"); \
	    sub(/ *\[.*/, ""); print "  " $$0; fflush() }'
	@test "$$(cat _build/status)" = 0 || { cat _build/book.log; exit 1; }
	@echo "The book: _build/html/index.html"

clean:
	@rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.ready $(VENV)/.book
	@find mrcnn_edu tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@find mrcnn_edu -name '*.so' -delete

# The first stamp: an environment with PyTorch, which the C++ ops are built against.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "Python 3.10 or newer is needed; choose one with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "The venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up .venv, only this once. PyTorch is a large download ..."
	@$(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision $(OR_SAY)
	@$(PIP) install -qq -c constraints.txt setuptools wheel ninja $(OR_SAY)
	@touch $@

# The second: the package itself, editable, with the compiled ops where there is a C++ compiler.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(wildcard setup.py csrc/*.* csrc/*/*.*)
	@$(PIP) install -v -c constraints.txt --no-build-isolation -e ".[dev]" $(OR_SAY)
	@echo "Ready (how it went is in $(LOG)). Ops: $$($(BIN)/python -c 'from mrcnn_edu import ops; print(ops.backend())')"
	@touch $@

$(VENV)/.book: $(VENV)/.ready
	@echo "Adding Jupyter Book and JupyterLab to .venv, only this once ..."
	@$(BIN)/python -c "from importlib.metadata import requires; \
	  print(*[r.split(';')[0] for r in requires('mrcnn_edu') if 'extra == \"book\"' in r], sep='\n')" > $(VENV)/book.txt
	@$(PIP) install -qq -c constraints.txt -r $(VENV)/book.txt $(OR_SAY)
	@touch $@
