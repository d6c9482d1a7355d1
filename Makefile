# What a maintainer does; in an environment of `make install`.
.PHONY: install check test test-slow docs package

install: ## the package, editable, with all that the rest takes
	pip install -e '.[dev]'

check: ## style, types, scripts, schemas
	pre-commit run --all-files

test: ## as README has it
	pytest

test-slow: ## the long ones, which `pytest` leaves out
	pytest -m slow

docs: ## into docs/_build; a warning is an error, and the examples in docstrings are run
	sphinx-build -qW --keep-going docs docs/_build/html
	sphinx-build -qW -b doctest docs docs/_build/doctest

package: ## wheel and sdist into dist
	rm -rf dist
	python -m build -q
	twine check --strict dist/*
