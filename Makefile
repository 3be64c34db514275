# make demo   from a fresh clone to a trained MoE on this machine's CPU, exported and writing text in transformers
# make test   what a user runs before trusting it; make prove: the long campaigns; make prove-chaos: 200 kills
# make test-newest   the tests that depend on libraries, with the newest ones, in a second virtual environment
# make lint   ruff and pyright; make docs: the documentation, as a site in site/

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST ?= .venv-newest
DATA := data/quickstart

# WORDS: key=value words for the demo, e.g. make demo WORDS="run.steps=500"
WORDS ?=

# What the tests' private Slurm cluster is made of (tests/slurm); without it those tests are skipped.
SLURM := slurmctld slurmd slurm-client munge
# What sites put around it: a database of accounts, modules, and a file system that caches.
EXTRAS := slurmdbd mariadb-server-core lmod bindfs fuse3

# A run and its tests are hundreds of short Pythons: each would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-newest slurm chromium libaio slurm-extras demo data test test-newest prove prove-chaos prove-slurm24 prove-python313 lint docs clean

install: $(VENV)/installed

# torch is asked for by its exact version: a plain `torch` downloads gigabytes of CUDA libraries.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

install-newest: $(NEWEST)/installed

# Newer versions of Megatron-Core state Python 3.12 and run on 3.11: there pip takes the newest one by force.
$(NEWEST)/installed: setup.py Makefile
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --upgrade pip
	$(NEWEST)/bin/pip install -q torch==2.13.0
	$(NEWEST)/bin/pip install -q torch==2.13.0 -e '.[dev]'
	$(NEWEST)/bin/pip install -q --no-deps --ignore-requires-python megatron-core==0.19.2
	touch $@

$(DATA)/tokenizer.model: | $(VENV)/installed
	$(BIN)/phalanx data tokenizer --corpus embedded --vocab-size 2048 --max-mb 6 --out $@

$(DATA)/train.idx: $(DATA)/tokenizer.model | $(VENV)/installed
	$(BIN)/phalanx data tokenize --corpus embedded --tokenizer $< --out $(DATA)/train

data: $(DATA)/train.idx

# Where WORDS put the run: run.dir, else run.name, else the config's own name; of several the last one counts.
lastword_of = $(lastword $(patsubst $(1)=%,%,$(filter $(1)=%,$(WORDS))))
RUN := $(or $(call lastword_of,run.dir),runs/$(or $(call lastword_of,run.name),quickstart))

# --force: the folder is the demo's own, a second demo exports what it then finds.
demo: $(DATA)/train.idx
	$(BIN)/phalanx launch configs/run/quickstart.yaml $(WORDS)
	$(BIN)/phalanx convert export $(RUN) $(RUN)/huggingface --force
	@echo; echo '$$ phalanx generate $(RUN)/huggingface      (transformers, from the exported files)'
	$(BIN)/phalanx generate $(RUN)/huggingface --temperature 0.7 --max-new-tokens 40 \
	  --prompt "def main(" --prompt "class Test" --prompt "import "

# As root on Debian or Ubuntu: the packages, where they are missing. The tests start daemons of their own.
slurm:
	@if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get install -y -qq --no-install-recommends $(SLURM) || \
	   (apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM))) >/dev/null \
	  || echo "no Slurm: its tests will be skipped" >&2; \
	else echo "no Slurm, and no root or apt-get to install it: its tests will be skipped" >&2; fi

# The browser in which the tests open the pages of phalanx report.
CHROMIUM := chromium chromium-driver

chromium:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get install -y -qq --no-install-recommends $(CHROMIUM) || \
	   (apt-get update -qq && apt-get install -y -qq --no-install-recommends $(CHROMIUM))) >/dev/null \
	  || echo "no Chromium: its tests will be skipped" >&2; \
	else echo "no Chromium, and no root or apt-get to install it: its tests will be skipped" >&2; fi

# Three test processes, a file at a time (tests/conftest.py). The tests of Slurm mostly wait, and leave two cores to the others.
test: install slurm chromium
	$(BIN)/python -m pytest -q -n 3 --no-loadscope-reorder

# Parity, engines, the independent trainer, rehearsals, conversion and whole runs, under Megatron-Core 0.19.
NEWEST_TESTS := tests/parallel/compat tests/reference tests/pretrain tests/tools/rehearse tests/tools/convert tests/run/test_commands.py tests/run/test_other_libraries.py

test-newest: install-newest
	$(NEWEST)/bin/python -m pytest -q -n 2 --no-loadscope-reorder $(NEWEST_TESTS)

# What DeepSpeed's swapping to NVMe is built from.
libaio:
	@if [ -e /usr/include/libaio.h ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get install -y -qq libaio-dev || (apt-get update -qq && apt-get install -y -qq libaio-dev)) >/dev/null \
	  || echo "no libaio: the tests that swap will be skipped" >&2; \
	else echo "no libaio, and no root or apt-get to install it: the tests that swap will be skipped" >&2; fi

slurm-extras:
	@if command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null && command -v bindfs >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get install -y -qq --no-install-recommends $(EXTRAS) || \
	   (apt-get update -qq && apt-get install -y -qq --no-install-recommends $(EXTRAS))) >/dev/null \
	  || echo "not all of $(EXTRAS): their tests will be skipped" >&2; \
	else echo "not all of $(EXTRAS), and no root or apt-get: their tests will be skipped" >&2; fi

prove: install slurm libaio slurm-extras
	$(BIN)/python -m pytest -q -m prove --timeout 3600

# A Debian 13 in a folder, with Slurm 24.11 and Python 3.13. As root on Debian or Ubuntu.
DEBIAN ?= .debian13
IN_DEBIAN := VENV=$(VENV) bash tests/debian13.sh run $(DEBIAN)

$(DEBIAN)/etc/debian_version:
	bash tests/debian13.sh make $(DEBIAN)

# The everyday tests of Slurm with the Slurm of Debian 13, and the Python of this machine.
prove-slurm24: install $(DEBIAN)/etc/debian_version
	PHALANX_REQUIRE_SLURM=1 $(IN_DEBIAN) $(BIN)/python -m pytest -q tests/slurm

# What needs no torch, where there is none: everything else that setup.py asks for, in an environment of Debian's Python. This
# machine's pip fetches the wheels; inside, pip complains if one is missing.
LIGHT := /opt/light
WITHOUT_TORCH_TESTS := tests/test_without_torch.py tests/test_design.py tests/configs tests/launch/watch tests/launch/test_status.py \
  tests/launch/test_logs.py tests/launch/test_plan.py tests/launch/test_launch_lock.py tests/launch/slurm/test_clock.py \
  tests/launch/slurm/test_environment.py tests/launch/slurm/test_lifecycle.py tests/launch/slurm/test_rendezvous.py \
  tests/launch/slurm/test_scheduler.py tests/launch/slurm/test_script.py tests/launch/slurm/test_verdict.py \
  tests/parallel/legality/test_legality.py tests/parallel/test_flops.py tests/pretrain/preflight/test_data.py \
  tests/pretrain/preflight/test_machine.py tests/pretrain/preflight/test_resume.py tests/pretrain/run/test_events.py \
  tests/pretrain/run/test_record.py tests/tools/data/test_cli.py tests/tools/data/test_cut_text.py \
  tests/tools/data/test_find_files.py tests/tools/data/test_special_tokens.py tests/tools/data/test_tokenizer.py \
  tests/tools/planner/test_memory.py tests/tools/planner/test_published.py tests/tools/planner/test_time.py \
  tests/tools/test_cli.py tests/tools/test_completion.py

$(DEBIAN)$(LIGHT)/installed: setup.py constraints.txt | install $(DEBIAN)/etc/debian_version
	rm -rf $(@D) && mkdir -p $(@D)/wheels
	$(BIN)/python -m pip download -q -c constraints.txt --python-version 3.13 --only-binary=:all: -d $(@D)/wheels \
	  $$($(BIN)/python -c "from importlib.metadata import requires; heavy = ('torch', 'megatron-core', 'deepspeed'); \
	  print(*(line.replace(' ', '') for line in requires('phalanx') if 'extra' not in line and not line.startswith(heavy)))") \
	  pytest pytest-timeout pytest-xdist hypothesis
	$(IN_DEBIAN) python3 -m venv $(LIGHT)
	$(IN_DEBIAN) bash -c '$(LIGHT)/bin/pip install -q --no-index $(LIGHT)/wheels/*.whl'
	touch $@

prove-python313: $(DEBIAN)$(LIGHT)/installed
	PYTHONPATH=. $(IN_DEBIAN) $(LIGHT)/bin/python -m pytest -q -p no:cacheprovider -m 'prove or not prove' $(WITHOUT_TORCH_TESTS)

# Random kills at random moments, on this machine and on the private Slurm side by side. A case alone:
# make prove-chaos CHAOS="--where slurm --seed 7 --kills 1"
CHAOS ?= --kills 200 --seed 0

prove-chaos: install slurm
	$(BIN)/python -m tests.chaos $(CHAOS) --out kills.json

lint: install
	$(BIN)/ruff check configs parallel pretrain launch tools tests docs setup.py
	$(BIN)/ruff format --check configs parallel pretrain launch tools tests docs setup.py
	$(BIN)/pyright --pythonpath $(BIN)/python

# Material prints a notice about another project on its first line; nothing of it is a warning of this build.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	rm -rf --one-file-system site $(VENV) $(NEWEST) $(DEBIAN) build *.egg-info
