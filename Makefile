# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint docs browser clean

demo: $(VENV)/.installed
	$(RUN) -m dive_fast demo --out demo

test: $(VENV)/.installed lint browser
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir site

# The tests of the pages want a Chromium. Root of a Debian gets one; elsewhere they are skipped.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get install -y -q chromium >/dev/null 2>&1 || \
			{ apt-get update -q && apt-get install -y -q chromium; } >/dev/null 2>&1; \
	fi; \
	command -v chromium >/dev/null || \
		echo "no Chromium here: the tests of the report, the app and the site in a browser are skipped."

# torch comes first: the extension is built against the torch that it will run with. open_clip comes
# alone: only its lists of classes are read, and its torchvision goes with few builds of torch. So do
# the corruptions: the OpenCV that they name wants libraries of a display.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools cmake ninja pybind11 torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,detect,test]'
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps open_clip_torch imagecorruptions-imaug
	touch $@

clean:
	rm -rf $(VENV) build demo site dive_fast.egg-info dive_fast/_C*.so dive_fast/_build_info*.so dive_fast/_build_record.json
