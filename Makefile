# `make demo` and `make test` set up everything they need in .venv (one folder per Python version).
PYTHON ?= python3
VENV   := .venv/$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN    := $(VENV)/bin
PACKAGE := $(VENV)/package
READY  := $(VENV)/ready

NOTEBOOKS := $(patsubst notebooks/%.py,build/notebooks/%.html,$(wildcard notebooks/*.py))

# Bytecode is written at the first import, wherever the environment forbids it, too: without it each process would
# rewrite every test anew. pip would write it for whole packages, of which a part is ever imported.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable

.PHONY: demo test tests slow lint browser notebooks notebooks-test docs clean

# The package alone, 0.8 GB; the other targets add what tests need to the same environment.
demo: $(PACKAGE)
	$(BIN)/kimi-jax demo

test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 lint tests

tests: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/check_docstrings.py

# Notebooks are scripts in the repository; executed and with their figures they are in build/notebooks.
notebooks: $(NOTEBOOKS)

build/notebooks/%.html: notebooks/%.py $(VENV)/notebooks
	@mkdir -p $(@D)
	$(BIN)/python -m jupytext --quiet --to ipynb --execute --output build/notebooks/$*.ipynb $<
	$(BIN)/python -m nbconvert --log-level WARN --to html build/notebooks/$*.ipynb

notebooks-test: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_notebooks.py

docs: $(NOTEBOOKS) $(VENV)/docs
	$(BIN)/python -m mkdocs build --strict --site-dir build/site
	cp -r build/notebooks build/site/notebooks

$(VENV)/notebooks $(VENV)/docs: $(PACKAGE)
	$(INSTALL) '.[$(@F)]'
	touch $@

# The tests of the chat page run in a Chromium of the system, and are skipped where there is none.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v $$name; then exit 0; fi; done; \
	echo "No Chromium is found. On Debian: apt-get install --no-install-recommends chromium"; \
	echo "On Fedora: dnf install chromium. On macOS: brew install --cask chromium"; exit 1

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(PACKAGE): pyproject.toml | $(BIN)/python
	$(INSTALL) .
	touch $@

# One installation, not the package's and another: resolving takes pip a while.
$(READY): pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test]'
	touch $(PACKAGE) $@

clean:
	rm -rf .venv build *.egg-info
