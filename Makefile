# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(RUN) -m dive_fast demo --out demo

test: $(VENV)/.installed lint
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

# torch comes first: the extension is built against the torch that it will run with.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools cmake ninja pybind11 torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,detect,test]'
	touch $@

clean:
	rm -rf $(VENV) build demo dive_fast.egg-info dive_fast/_C*.so dive_fast/_build_info*.so dive_fast/_build_record.json
