# Every target works on a bare machine with Python 3.11, g++ and a package index: each makes .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.lock-stamp
STORES := .cache/stores
# Test files that carry a marker: those of few files need not import all others, for half a minute.
marked = $$(grep -rl --include='test_*.py' 'pytest\.mark\.$(1)' tests)
CHROMIUM = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# DeepSpeed compiles CPUAdam at first use; kept in the clone so that two clones never share a build.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
# So that a wrong Python is an error here, and never a silent download of another one.
export UV_PYTHON_DOWNLOADS := never
# Some wheels are gigabytes: wait longer than 30 seconds for a slow index.
export UV_HTTP_TIMEOUT ?= 300
# The deepspeed launcher looks for `python` and `ninja` on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help venv quickstart quickstart-text test test-browser test-cluster test-stores test-faults fuzz slurm chromium lint audit format bench pictures

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

venv: $(STAMP) ## make .venv with the exact versions of requirements.lock

# Redone only when the lock changes. Compiled at once: many ranks start together, perhaps from a folder that they
# cannot write, and each would compile for half a minute. uv is taken from PATH or put into a small environment of its own.
$(STAMP): requirements.lock
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	    echo "error: Python 3.11 is needed; found '$(PYTHON)': say make PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	if uv --version >/dev/null 2>&1; then uv=uv; else \
	    uv=.cache/uv/bin/uv; \
	    [ -x $$uv ] || { "$(PYTHON)" -m venv .cache/uv && .cache/uv/bin/python -m pip install --quiet uv; }; fi; \
	set -x; \
	[ -x $(PY) ] || $$uv venv --python "$(PYTHON)" $(VENV); \
	$$uv pip install --compile-bytecode --require-hashes --python $(PY) --requirements requirements.lock; \
	printf '#!%s\nimport sys\nsys.path.insert(0, "%s")\nfrom selfdistill.__main__ import main\nmain()\n' \
	    "$(CURDIR)/$(PY)" "$(CURDIR)" >$(VENV)/bin/selfdistill; chmod +x $(VENV)/bin/selfdistill; \
	touch $(STAMP)

quickstart: venv ## the main job on a small real set: pack, pretrain, distill, finetune, and a table
	$(PY) -m launcher.quickstart $(ARGS)

quickstart-text: venv ## the same on texts: docstrings of installed packages, by their package
	$(PY) -m launcher.quickstart --kind text $(ARGS)

test: venv ## all tests but the browser's, the cluster's and the stores' (ARGS="-k order" picks some)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not browser and not cluster and not stores and not faults" $(ARGS)

test-browser: chromium ## the tests that open TensorBoard in headless Chromium
	$(PY) -m pytest $(call marked,browser) -n 2 --dist loadfile -m browser $(ARGS)

test-cluster: venv slurm ## the tests on a real SLURM cluster, made of namespaces; needs root
	$(PY) -m pytest tests/cluster -n 2 --dist loadfile -m "cluster and not faults" $(ARGS)

test-stores: $(STORES)/.stamp ## sets in S3: moto's server on loopback, s3fs
	PYTHONPATH=$(CURDIR)/$(STORES) $(PY) -m pytest $(call marked,stores) -m "stores and not faults" $(ARGS)

# Beside .venv and not in it: botocore wants an older python-dateutil.
$(STORES)/.stamp: tests/data/remote/stores.lock | venv
	if uv --version >/dev/null 2>&1; then uv=uv; else uv=.cache/uv/bin/uv; fi; \
	rm -rf $(STORES); \
	$$uv pip install --python $(PY) --target $(STORES) --no-deps --require-hashes --requirements $<; \
	touch $@

test-faults: venv slurm ## what happens to clusters, twenty interruptions, and their table (long)
	$(PY) -m pytest -s -m faults $(ARGS)

# No daemon is started by its package: policy-rc.d forbids it, for this installation only.
slurm: ## Debian's SLURM, unless it is there
	@need="slurmctld slurmd slurm-client munge iproute2"; policy=/usr/sbin/policy-rc.d; \
	if [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/munged ] \
	    && command -v sbatch >/dev/null && command -v ip >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "no SLURM here, and only root on Debian can install it: apt-get install $$need" >&2; exit 0; fi; \
	if [ ! -e $$policy ]; then \
	    trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$need

chromium: venv ## Debian's Chromium, unless there is one
	@if [ -z "$(CHROMIUM)" ]; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	    else \
	        echo "error: no Chromium on PATH: install your system's package 'chromium', then run this again" >&2; exit 2; \
	    fi; fi

lint: venv ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: venv ## let ruff put files in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Where the index has no table of vulnerabilities, as mirrors have none, the audit can say nothing.
audit: venv ## known vulnerabilities of the locked packages, where the index tells of them
	@if uv --version >/dev/null 2>&1; then uv=uv; else uv=.cache/uv/bin/uv; fi; \
	found=$$($$uv tool run --python $(PY) pip-audit --disable-pip --no-deps -r requirements.lock 2>&1) || true; \
	case $$found in \
	*"Found "*" known vulnerabilit"*) printf '%s\n' "$$found"; exit 1 ;; \
	*"could not be audited"*) echo "audit: this index tells of no vulnerabilities" ;; \
	*"No known vulnerabilities"*) echo "audit: no known vulnerabilities" ;; \
	*) echo "audit: the index cannot be asked: $${found##*$$'\n'}" ;; \
	esac

fuzz: venv ## an hour of broken and hostile inputs (ARGS="--seconds 60" takes less)
	$(PY) -m tests.fuzz $(ARGS)

bench: venv ## time a training step
	$(PY) -m benchmarks.step $(ARGS)

pictures: chromium ## the pictures of README.md and docs/, from make quickstart's run
	$(PY) docs/draw.py runs/quickstart/run
	rm -rf runs/digits && PATH=$(CURDIR)/.venv/bin:$$PATH $(PY) docs/draw.py terminal selfdistill train --num_gpus 2 \
	    --recipe quickstart --data runs/quickstart/shards --output runs/digits
	$(PY) -m launcher.screenshot runs/quickstart/run docs/pictures/tensorboard-scalars.png --tags . --overwrite
	$(PY) -m launcher.screenshot runs/quickstart/run docs/pictures/tensorboard-images.png --tab images \
	    --tags reconstruction --actual_size --overwrite
