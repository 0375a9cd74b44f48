# Everything runs in the active environment if that has torch, else in .venv; see tools/environment.py.
PYTHON ?= python3
# Test processes side by side; each holds its own torch (about 1 GB).
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST = $$(cat build/python) -m pytest -n $(WORKERS) --dist worksteal
ARGS ?=

.PHONY: bench test test-full build wheel lint format clean

bench: build
	@$$(cat build/python) -m fasttx.cli bench --quick $(ARGS)

test: build
	@$(PYTEST) -m "not slow" $(ARGS)

test-full: build
	@$(PYTEST) $(ARGS)

build:
	@$(PYTHON) tools/environment.py

# An sdist, and from it a wheel that needs no compiler where it is installed.
wheel: build
	@rm -rf dist
	@$$(cat build/python) -m build --no-isolation --skip-dependency-check -o dist .
	@ls -sh dist

lint: build
	@$$(cat build/python) -m ruff --version >/dev/null 2>&1 || $$(cat build/python) -m pip install -q "ruff>=0.12"
	@$$(cat build/python) -m ruff check .
	@$$(cat build/python) -m ruff format --check .
	@if command -v clang-format >/dev/null; then find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs clang-format --dry-run -Werror; fi

format: build
	@$$(cat build/python) -m ruff format .
	@$$(cat build/python) -m ruff check --fix .

clean:
	rm -rf build dist reports *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f fasttx/*.so fasttx/_build.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
