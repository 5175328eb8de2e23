# Everything from a bare clone: git, make and Python 3.11 or newer. `make demo` is the place to start.

PYTHON ?= python3
VENV   ?= .venv
# Where `make demo` writes; more options for the recipe: make demo ARGS="train.steps=10"
RUN    ?= runs/caption_ppo
ARGS   ?=
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
# More threads only slow so small a model down.
THREADS ?= 2
# Processes that share the tests, of one thread each and up to 3 GiB.
WORKERS ?= 2
# Named in full, so that accelerate neither asks for a config file nor warns that there is none.
LAUNCH := $(VENV)/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no \
          --dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.PHONY: install demo test soak check bench docs clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(LAUNCH) recipes/caption_ppo.py output.dir=$(RUN) $(ARGS)
	@echo "The report: $(RUN)/report.html"

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

# Runs that are killed, starved and hung by the dozen (docs/reliability.md): an hour on two cores.
soak: $(VENV)/.installed-dev
	$(PY) -m pytest -m soak -s

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Each claim of the README is one file there; stops at the first that fails. _*.py is what they share. Hours: against
# TRL alone one takes 50 minutes on two cores.
bench: $(VENV)/.installed-dev
	@set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(PY) $$file; done

# The documentation as a site, into site/; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "Open site/index.html, or for the search: $(PY) -m http.server --directory site"

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache $(VENV)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmft needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable: a changed file counts at once, and only changed dependencies install again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	@echo 'Installing into $(VENV): a minute or two.'
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# torchvision without its dependencies: it must not pull in another torch (see tests/torchvision_shim.py).
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	$(PIP) install --quiet --no-deps -c constraints.txt torchvision
	$(PY) tests/torchvision_shim.py
	@touch $@
