# make help says what each target does. Every target sets up .venv by itself when it is missing or older than the
# requirements. Variables pass through: make train BASE=models/v1-5-pruned.ckpt DATA=data/fill50k ARGS="--batch-size 4"

PYTHON ?= python3
PY := .venv/bin/python
BASE ?=
DATA ?=
OUT ?=
ARGS ?=
MODEL ?= runs/demo
HINT ?= $(MODEL)/hint.png
PROMPT ?= light sea green circle with dark salmon background
HUB := https://huggingface.co

# Modules are compiled when they are first imported, and the result is kept: pip would compile all of PyTorch.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train play sample data pretrain merge bench test lint format fill50k sd15 clean

help:  ## list the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /  \1\t/' | expand -t 12

.venv/.run: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "setting up .venv (once; PyTorch is large)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	@touch $@

setup: .venv/.run  ## make .venv with what training needs

train: .venv/.run  ## train a ControlNet: the demo, or BASE= DATA= [OUT=] [ARGS=]
	$(PY) train.py $(if $(BASE),--base $(BASE)) $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out $(OUT)) $(ARGS)

play: .venv/.run  ## open a page, draw a hint on it and see the ControlNet obey: [MODEL=] [ARGS=]
	$(PY) play.py --model $(MODEL) $(ARGS)

sample: .venv/.run  ## draw with a trained one: [MODEL=] [HINT=] [PROMPT=] [OUT=] [ARGS=]
	$(PY) sampler.py --model $(MODEL) --hint $(HINT) $(if $(filter $(MODEL)/hint.png $(MODEL)/hint.npy,$(HINT)),--hint-scale 0) --prompt "$(PROMPT)" $(if $(OUT),--out $(OUT)) $(ARGS)

data: .venv/.run  ## make the demo's data set, data/circles
	$(PY) -m toy.circles make data/circles $(ARGS)

pretrain: .venv/.run  ## make models/tiny_sd.safetensors, the demo's base, from nothing (some hours on two cores)
	$(PY) -m toy.pretrain $(ARGS)

merge: .venv/.run  ## attach a ControlNet to a Stable Diffusion file: BASE= OUT= [ARGS=]
	$(PY) merge.py attach $(BASE) $(OUT) $(ARGS)

bench: .venv/.dev  ## measure this machine against diffusers, in five minutes: [ARGS=]
	$(PY) bench.py table $(ARGS)

test: .venv/.dev  ## lint, then all tests
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=auto --dist=worksteal $(ARGS)

lint: .venv/.dev  ## ruff alone
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: .venv/.dev  ## let ruff put the code in form
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

fill50k: data/fill50k/prompt.json  ## download Fill50K into data/fill50k

data/fill50k/prompt.json:
	mkdir -p data
	test -f data/fill50k.zip || { curl -fL -C - -o data/fill50k.zip.partial \
	  $(HUB)/lllyasviel/ControlNet/resolve/main/training/fill50k.zip && mv data/fill50k.zip.partial data/fill50k.zip; }
	rm -rf data/unpacking && $(PYTHON) -m zipfile -e data/fill50k.zip data/unpacking
	mv data/unpacking/fill50k data/fill50k && rm -rf data/unpacking

sd15: models/v1-5-pruned.ckpt  ## download Stable Diffusion 1.5 (7.7 GB) into models

models/v1-5-pruned.ckpt:
	curl -fL -C - -o $@.partial $(HUB)/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned.ckpt
	mv $@.partial $@

clean:  ## remove .venv, caches and the demo's run (data sets and other runs stay)
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__ tests/golden/__pycache__ data/.cache runs/demo
