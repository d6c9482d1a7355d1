# Tasks of maintainers, in an environment from `make install`.
.PHONY: install check test test-slow test-oldest test-3.12 test-3.13 docs linkcheck package

install: ## the package, editable, with the dependencies of all other targets
	pip install -e '.[dev]'

check: ## style, types, scripts, schemas
	pre-commit run --all-files

test: ## the default tests
	pytest

test-slow: ## the slow tests, which `pytest` skips; dealt out in order, so that no long one runs last and alone
	pytest -m slow --dist=load

test-oldest: ## tests on Python 3.10 with the oldest releases that pyproject.toml allows
	python3.10 -m venv .venvs/oldest
	.venvs/oldest/bin/pip install -q -c tests/oldest.txt -e '.[dev]'
	.venvs/oldest/bin/pytest

test-3.12 test-3.13: test-%: ## tests on this Python with the newest releases
	python$* -m venv .venvs/$*
	.venvs/$*/bin/pip install -q -e '.[dev]'
	.venvs/$*/bin/pytest

docs: ## pages in docs/_build; warnings are errors, and docstring examples are run
	sphinx-build -qW --keep-going docs docs/_build/html
	sphinx-build -qW -b doctest docs docs/_build/doctest

linkcheck: docs ## links within the site and to other sites; needs a network
	pytest -n 0 -m slow tests/test_site.py
	sphinx-build -q -b linkcheck docs docs/_build/linkcheck

package: ## wheel and sdist in dist
	rm -rf dist
	python -m build -q
	twine check --strict dist/*
