# make lab opens the labs, make test runs every test; both first set up what is missing. See make help.
PORT ?= 8888
LAB_ARGS ?=
PYTEST_ARGS ?=
# test processes; each takes a core and up to 2 GB
JOBS ?= 2

# the Python to make .venv with; PYTHON names another
BASE_PYTHON := $(or $(PYTHON),python3)
BIN := $(CURDIR)/.venv/bin
# idle threads sleep instead of spinning: several times faster where cores are shared
export OMP_WAIT_POLICY ?= passive
# JupyterLab refuses to run as root unless told so; in a container that is the usual user
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# $(call environment,EXTRAS): make .venv, or complete it, in a moment when there is nothing to do
define environment
	@command -v $(BASE_PYTHON) >/dev/null || { echo "lecturekit: there is no $(BASE_PYTHON): install Python 3.11, 3.12 or 3.13," \
		"or name it: make lab PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(BASE_PYTHON) -I lecturekit/bootstrap.py $(1)
endef

# stop early where the browser tests would fail
define chromium
	@for name in "$${CHROMIUM:-chromium}" chromium-browser google-chrome; do command -v "$$name" >/dev/null && exit 0; done; \
		echo "lecturekit: the browser tests need Chromium: install your system's package chromium, name a Chromium in CHROMIUM," \
		"or leave them out: make test PYTEST_ARGS=\"-m 'not browser'\"" >&2; exit 1
endef

.PHONY: help lab test labs-full bench-gpu release lint format environment.yml clean

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z.-]+:.*  ## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lab:  ## open the labs in JupyterLab, on this machine only (PORT=8888, LAB_ARGS=--no-browser)
	$(call environment)
	@"$(BIN)/python" -m lecturekit.models
	@"$(BIN)/jupyter" lab --ip=127.0.0.1 --port=$(PORT) --ServerApp.root_dir="$(CURDIR)/labs" $(AS_ROOT) $(LAB_ARGS)

test:  ## run every test (PYTEST_ARGS='-m "not slow and not browser"' for some of them)
	$(call environment,grading development)
	@"$(BIN)/python" -m lecturekit.models
	$(if $(findstring not browser,$(PYTEST_ARGS)),,$(chromium))
	@OMP_NUM_THREADS=1 PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

labs-full:  ## run every lab's solution at full size, write docs/results.md (LABS=lab05_lora for one, SEEDS=5)
	$(call environment,grading)
	@"$(BIN)/python" -m lecturekit.models
	@"$(BIN)/lecturekit" labs-full $(LABS) --seeds $(or $(SEEDS),1)

bench-gpu:  ## time the fused kernels on this machine's GPU, write benchmarks/results/kernels.md
	$(call environment,grading development)
	@"$(BIN)/python" -P benchmarks/kernels.py gpu

release:  ## make the students' notebooks in labs/ from solutions/
	$(call environment,grading)
	@"$(BIN)/lecturekit" release $(LABS)

lint:  ## check style and types
	$(call environment,grading development)
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

format:  ## put the code in the common style
	$(call environment,grading development)
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

environment.yml: pyproject.toml  ## write the conda environment from pyproject.toml
	@"$(BIN)/python" -I lecturekit/bootstrap.py --environment

clean:  ## remove .venv and what tools left behind; models, submissions and marks stay
	rm -rf .venv .venv.lock .pytest_cache .ruff_cache .mypy_cache build lecturekit.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
