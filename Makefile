# What a maintainer does; in an environment of `make install`.
.PHONY: install check test test-slow test-oldest test-3.12 test-3.13 docs linkcheck package

install: ## the package, editable, with all that the rest takes
	pip install -e '.[dev]'

check: ## style, types, scripts, schemas
	pre-commit run --all-files

test: ## as README has it
	pytest

test-slow: ## the long ones, which `pytest` leaves out
	pytest -m slow

test-oldest: ## on Python 3.10, with the oldest releases that pyproject.toml allows
	python3.10 -m venv .venvs/oldest
	.venvs/oldest/bin/pip install -q -c tests/oldest.txt -e '.[dev]'
	.venvs/oldest/bin/pytest

test-3.12 test-3.13: test-%: ## on this Python, with the newest releases
	python$* -m venv .venvs/$*
	.venvs/$*/bin/pip install -q -e '.[dev]'
	.venvs/$*/bin/pytest

docs: ## into docs/_build; a warning is an error, and the examples in docstrings are run
	sphinx-build -qW --keep-going docs docs/_build/html
	sphinx-build -qW -b doctest docs docs/_build/doctest

linkcheck: docs ## links within the site and to other sites; needs a network
	pytest -n 0 -m slow tests/test_site.py
	sphinx-build -q -b linkcheck docs docs/_build/linkcheck

package: ## wheel and sdist into dist
	rm -rf dist
	python -m build -q
	twine check --strict dist/*
