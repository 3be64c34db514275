# make demo   from a fresh clone to a trained MoE on this machine's CPU
# make test   what a user runs before trusting it; make prove: the long campaigns
# make lint   ruff and pyright

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := data/quickstart

# WORDS: key=value words for the demo, e.g. make demo WORDS="run.steps=500"
WORDS ?=

.PHONY: install demo data test prove lint clean

install: $(VENV)/installed

# torch is asked for by its exact version: a plain `torch` downloads gigabytes of CUDA libraries.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(DATA)/tokenizer.model: | $(VENV)/installed
	$(BIN)/phalanx data tokenizer --corpus embedded --vocab-size 2048 --max-mb 6 --out $@

$(DATA)/train.idx: $(DATA)/tokenizer.model | $(VENV)/installed
	$(BIN)/phalanx data tokenize --corpus embedded --tokenizer $< --out $(DATA)/train

data: $(DATA)/train.idx

demo: $(DATA)/train.idx
	$(BIN)/phalanx launch configs/run/quickstart.yaml $(WORDS)

test: install
	$(BIN)/python -m pytest -q

prove: install
	$(BIN)/python -m pytest -q -m prove --timeout 3600

lint: install
	$(BIN)/ruff check configs parallel pretrain launch tools tests setup.py
	$(BIN)/ruff format --check configs parallel pretrain launch tools tests setup.py
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info
