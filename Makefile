# What a change has to pass, by parts. `.ci/run` runs the same on a copy of the tracked files in a new environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup fast test nightly lint format types wheel demo docs ci

setup: $(BIN)/ds4convert  ## an environment for development in .venv

$(BIN)/ds4convert: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[test]'
	touch $(BIN)/ds4convert

fast: setup  ## something of every folder, within a minute
	$(BIN)/pytest -n 2 -m fast

test: setup  ## all tests that run on every change
	$(BIN)/pytest -n 2

nightly: setup  ## the long runs as well
	$(BIN)/pytest -n 2 --nightly

lint: setup  ## format and lint, as a check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup  ## format and lint, as a repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy --strict
	$(BIN)/mypy

wheel: setup  ## the wheel, in dist/
	$(BIN)/python -m build --wheel --outdir dist .

demo: setup  ## the whole chain on the checkpoint that comes along
	$(BIN)/ds4convert demo

docs: setup  ## the site of docs/ and mkdocs.yml, in site/; a link that leads nowhere ends it
	$(BIN)/pip install -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

ci:  ## everything, in a new environment
	.ci/run
