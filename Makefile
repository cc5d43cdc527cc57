# make demo    set up .venv, build Horovod (once), train both examples on 2 processes
# make test    the same set-up, then every test
# make test-gpu  the tests that need an NVIDIA GPU, with what is installed; docs/gpu.md
# make lint    ruff and mypy
# make bench   the benchmarks
# make clean   remove what these made here; built Horovod wheels stay in the user's cache

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo test test-gpu lint types bench clean tools hosts .venv

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/hvdx run
# Cores start one after the other there, and again, so that the rendezvous must stay open.
TRAPS := HOROVOD_DYNAMIC_PROCESS_SETS=1 $(BIN)/python tests/parallel/run.py 2 \
	--tests tests/traps --limit 180 --test-limit 60

demo: .venv
	$(RUN) -np 2 -- $(BIN)/python examples/digits_torch.py
	$(RUN) -np 2 -- $(BIN)/python examples/digits_keras.py

# Ranks start by the hundred, and each would compile every module and test anew.
test: export PYTHONDONTWRITEBYTECODE :=
# Keras imports much that no test needs.
test: export PYTHONPATH := $(CURDIR)/tests/lean$(if $(PYTHONPATH),:$(PYTHONPATH))
test: .venv hosts
	$(BIN)/python -m pytest --timeout 300 --numprocesses 2 --dist loadfile tests/single
	$(BIN)/python tests/parallel/run.py 2 4
	$(TRAPS)
	echo "--- The same traps on plain Horovod, which must fail each of them:"
	$(TRAPS) -- --plain
	$(BIN)/python -m pytest --timeout 600 --numprocesses 2 --dist loadfile --durations 15 tests/integration

# Not by `make .venv`: constraints.txt pins CPU builds. BIN=... names another environment.
test-gpu:
	$(BIN)/python -m pytest --timeout 600 --durations 10 tests/gpu

lint: .venv/packages types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install to integrations/ (imported as hvdx.integrations), so it
# checks the tree as packaged; sed turns the paths back.
types: .venv/packages
	rm -rf build/lint
	$(BIN)/python setup.py --quiet build_py --build-lib build/lint
	$(BIN)/mypy build/lint/hvdx | sed -e 's,^build/lint/hvdx/integrations/,integrations/,' -e 's,^build/lint/,,'

bench: .venv
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv: .venv/horovod

# Nothing to do in seconds if the installed Horovod is the right one.
.venv/horovod: .venv/packages $(wildcard hvdx/build/*.py)
	$(BIN)/hvdx install
	touch $@

# torch is pinned by constraints.txt: without the pin pip takes the newest, with 3 GB of CUDA.
.venv/packages: constraints.txt pyproject.toml setup.py | tools
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,tensorflow,examples,dev]'
	touch $@

# Two hosts on one machine, for one of the integration tests; it says so where it is skipped.
hosts:
	@missing=
	[ -x /usr/sbin/sshd ] || missing+=' openssh-server'
	command -v ssh >/dev/null || missing+=' openssh-client'
	command -v ip >/dev/null || missing+=' iproute2'
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		apt-get update
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $$missing
	fi

# What pip cannot bring. make itself is here already.
tools:
	@missing=
	command -v g++ >/dev/null || missing+=' g++'
	command -v cmake >/dev/null || missing+=' cmake'
	command -v $(PYTHON) >/dev/null || missing+=' python3'
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing+=' python3-venv'
	$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' \
		2>/dev/null || missing+=' python3-dev'
	if [ -n "$$missing" ]; then
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
			echo "Missing:$$missing. Install them and run make again" \
				"(Debian, Ubuntu: sudo apt-get install$$missing)." >&2
			exit 1
		fi
		apt-get update
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $$missing
	fi
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || {
		echo "hvdx needs Python 3.10 to 3.12, but $(PYTHON) is $$($(PYTHON) --version)." \
			"Name another one: make PYTHON=python3.11" >&2
		exit 1
	}
