# Each target makes the environment first, if it is missing or out of date.
#
#   make demo            make demo DATA=/path/to/folder ARCH=restv2
#   make page            make page CHECKPOINT=epoch_12.pth CONFIG=my_config.py
#   make test-fast       make test ARGS='-k checkpoint' WORKERS=4
#   make env STACK=onedl make env ENV=/big/disk/env PYTHON=python3.11

STACK ?= openmmlab
PYTHON ?=
DATA ?=
ARCH ?=
WORK_DIR ?= work_dirs/demo
CHECKPOINT ?=
CONFIG ?=
COMPARE ?=
COMPARE_CONFIG ?=
PAGE_PORT ?= 7860
ARGS ?=
HOURS ?= 0.1
WORKERS ?= 2

# Some systems have a variable ENV of their own: only the one given to make counts.
ifneq ($(origin ENV),command line)
ENV := .venv-$(STACK)
endif
BIN = $(ENV)/bin
# One thread a worker; all tests of a file share its fixtures. Files in their order: some
# (those that import toy_runs) fork, which they cannot after torch.compile ran in the same
# process.
PYTEST = OMP_NUM_THREADS=1 '$(BIN)/python' -m pytest -n $(WORKERS) --dist loadfile \
	--no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env demo page test test-fast test-oldest test-cuda lint docs bench soak

help:
	@echo 'make env          set up the environment   STACK=openmmlab|onedl ENV=folder PYTHON=python3.11'
	@echo '                  (TORCH, TORCH_INDEX, MMCV_FIND_LINKS, ...: see tools/make_env.sh)'
	@echo 'make demo         train, evaluate and draw a ResT detector   DATA=folder (COCO, VOC, YOLO) WORK_DIR=folder ARCH=rest|restv2'
	@echo 'make page         look at what a model finds, in a browser   CHECKPOINT=file CONFIG=file COMPARE=file PAGE_PORT=7860'
	@echo 'make test         all tests                WORKERS=processes ARGS=options-of-pytest'
	@echo 'make test-fast    the tests that are not marked slow'
	@echo 'make test-oldest  the tests of the backbone with the oldest torch that is promised, or TORCH=2.14.1'
	@echo 'make test-cuda    the tests that need a GPU   PYTHON=a Python that has torch for CUDA'
	@echo 'make lint         ruff, codespell, mypy'
	@echo 'make docs         build the documentation into site/'
	@echo 'make bench        measure the backbone     ARGS=options-of-the-benchmark'
	@echo 'make soak         train, kill and resume in a loop, and count the damage   HOURS=0.1'

env:
	@PYTHON='$(PYTHON)' bash tools/make_env.sh '$(STACK)' '$(ENV)'

demo: env
	'$(BIN)/python' projects/demo/run.py --work-dir '$(WORK_DIR)' $(if $(DATA),--data '$(DATA)') $(if $(ARCH),--arch '$(ARCH)')

page: env
	'$(BIN)/python' -c 'import gradio' 2>/dev/null || \
	  '$(BIN)/python' -m pip install -q -r requirements/page.txt -c requirements/tested.txt
	'$(BIN)/python' projects/page/page.py --port '$(PAGE_PORT)' $(ARGS) \
	  $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(CONFIG),--config '$(CONFIG)') \
	  $(if $(COMPARE),--compare '$(COMPARE)') \
	  $(if $(COMPARE_CONFIG),--compare-config '$(COMPARE_CONFIG)')

test: env
	$(PYTEST) $(ARGS)

test-fast: env
	$(PYTEST) -m 'not slow' $(ARGS)

test-oldest:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash tools/test_oldest_torch.sh $(ARGS)

# The environment has torch for CPUs unless TORCH_INDEX said otherwise.
test-cuda: $(if $(PYTHON),,env)
	'$(or $(PYTHON),$(BIN)/python)' -m pytest tests/test_cuda tests/test_ops/test_triton.py $(ARGS)

lint: env
	'$(BIN)/ruff' check .
	'$(BIN)/ruff' format --check .
	'$(BIN)/codespell' .
	'$(BIN)/mypy'

docs: env
	'$(BIN)/python' -m mkdocs --version >/dev/null 2>&1 || \
	  '$(BIN)/python' -m pip install -q -r requirements/docs.txt -c requirements/tested.txt
	'$(BIN)/python' -m mkdocs build --strict

bench: env
	'$(BIN)/python' tools/analysis_tools/benchmark.py $(ARGS)

soak: env
	'$(BIN)/python' projects/soak/soak.py --hours '$(HOURS)' $(ARGS)
