# Each target makes the environment first, if it is missing or out of date.
#
#   make demo            make demo DATA=/path/to/coco-format-folder
#   make test            make test ARGS='-m "not slow" -k checkpoint'
#   make env STACK=onedl make env ENV=/big/disk/env PYTHON=python3.11

STACK ?= openmmlab
PYTHON ?=
DATA ?=
WORK_DIR ?= work_dirs/demo
ARGS ?=
HOURS ?= 0.1

# Some systems have a variable ENV of their own: only the one given to make counts.
ifneq ($(origin ENV),command line)
ENV := .venv-$(STACK)
endif
BIN = $(ENV)/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench soak

help:
	@echo 'make env    set up the environment   STACK=openmmlab|onedl ENV=folder PYTHON=python3.11'
	@echo '            (TORCH, TORCH_INDEX, MMCV_FIND_LINKS, ...: see tools/make_env.sh)'
	@echo 'make demo   train, evaluate and draw a ResT detector   DATA=coco-folder WORK_DIR=folder'
	@echo 'make test   run the tests            ARGS=options-of-pytest'
	@echo 'make lint   ruff and codespell'
	@echo 'make bench  measure the backbone     ARGS=options-of-the-benchmark'
	@echo 'make soak   train, kill and resume in a loop, and count the damage   HOURS=0.1'

env:
	@PYTHON='$(PYTHON)' bash tools/make_env.sh '$(STACK)' '$(ENV)'

demo: env
	'$(BIN)/python' projects/demo/run.py --work-dir '$(WORK_DIR)' $(if $(DATA),--data '$(DATA)')

test: env
	'$(BIN)/python' -m pytest $(ARGS)

lint: env
	'$(BIN)/ruff' check .
	'$(BIN)/ruff' format --check .
	'$(BIN)/codespell' .

bench: env
	'$(BIN)/python' tools/analysis_tools/benchmark.py $(ARGS)

soak: env
	'$(BIN)/python' projects/soak/soak.py --hours '$(HOURS)' $(ARGS)
