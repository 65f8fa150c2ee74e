# `make setup` is run by the targets that need it and does nothing when nothing has changed.

PYTHON ?= python3
VENV ?= .venv
# Extra arguments for pip, for example an index that holds CPU-only wheels of torch.
PIP_ARGS ?=
# Extra arguments for the command of a target: make test ARGS="-k swap".
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
# The machine with a GPU may have torch in a Python of its own and no .venv.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
# What gpu-check and gpu-study leave: results and the log of each part.
OUT ?= benchmarks/results/gpu

.PHONY: help setup demo test lint format bench bench-exchange bench-shuffle bench-trainer compare \
	compare-fashion study study-report release-check gpu-test gpu-bench gpu-check gpu-study docs figures clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## create .venv with the pinned versions

# Without build isolation, so that the build backend is a pinned one as well. timm and lightly, which
# tests convert, without torchvision: it can't be imported beside the CPU build of torch.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt hatchling hatch-fancy-pypi-readme
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps lightly timm
	@touch $@

demo: setup ## the seed's check on two ranks, then MoCo with and without the leak
	$(BIN)/python main.py --gpu 0,1 --shuffle --epochs 10
	$(BIN)/shuffle-batchnorm compare --bn local,regroup --ranks 2 --groups 16 --device cpu --output runs/demo

# Files go to workers whole, so that each keeps few processes of ranks; one thread each is faster.
test: setup ## run every test, and the examples in the docstrings, with two workers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## let ruff fix what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Compiling takes long, so the layer has two shapes there, and MoCo is left out.
bench: setup ## measure layers, steps, exchanges, shuffles; print targets, draw docs/*_speed.png: 10 minutes
	$(BIN)/python benchmarks/bench_host.py --save
	$(BIN)/python benchmarks/bench_layer.py --seconds 4 --save
	$(BIN)/python benchmarks/bench_layer.py --channels-last --seconds 2 --memory-batch 0 \
		--save layer_channels_last
	$(BIN)/python benchmarks/bench_layer.py --compiled --shapes 64x112x112 256x14x14 \
		--seconds 3 --save layer_compiled
	$(BIN)/python benchmarks/bench_layer.py --channels-last --compiled --shapes 64x56x56 256x14x14 \
		--seconds 2 --memory-batch 0 --save layer_channels_last_compiled
	$(BIN)/python benchmarks/bench_layer.py --ranks 2 --groups 1 --shapes 64x56x56 512x7x7 \
		--seconds 4 --save layer_ranks
	$(BIN)/python benchmarks/bench_step.py --floor --seconds 8 --save
	$(BIN)/python benchmarks/bench_step.py --compiled --steps supervised --bn swap regroup \
		--groups 1 --batch 64 --seconds 24 --save
	$(BIN)/python benchmarks/bench_exchange.py --rounds 31 --save
	$(BIN)/python benchmarks/bench_batch_shuffle.py --rounds 41 --save
	$(BIN)/python benchmarks/targets.py
	$(BIN)/python docs/draw_benchmarks.py

bench-exchange: setup ## measure a layer's exchange against the seed's and SyncBatchNorm's
	$(BIN)/python benchmarks/bench_exchange.py $(ARGS)

bench-shuffle: setup ## measure batch_shuffle against an all_gather of all samples
	$(BIN)/python benchmarks/bench_batch_shuffle.py $(ARGS)

bench-trainer: setup ## measure what the trainer adds to a step
	$(BIN)/python benchmarks/bench_trainer.py $(ARGS)

compare: setup ## the comparison of docs/comparison.md: 35 runs, about 15 minutes on one core
	OMP_NUM_THREADS=1 $(BIN)/shuffle-batchnorm compare --bn local,sync,swap,regroup,batch-shuffle,eman,simclr \
		--seeds 10,11,12,13,14 --ranks 1 --groups 32 --linear --device cpu --output runs/digits $(ARGS)

compare-fashion: setup ## the same question on 60,000 images; 15 runs of five minutes, on one core
	OMP_NUM_THREADS=1 $(BIN)/shuffle-batchnorm compare --dataset fashion-mnist --image-size 16 --bn local,regroup,eman \
		--seeds 10,11,12,13,14 --ranks 1 --groups 32 --queue 4096 --channels-last --epochs 15 --linear --device cpu \
		--output runs/fashion $(ARGS)

study: setup ## the study of docs/law.md: more than 300 runs, hours; stop and go on; records in runs/study
	$(BIN)/shuffle-batchnorm study --output runs/study $(ARGS)

study-report: setup ## the study's tables, figures and page from the committed records, in seconds
	$(BIN)/shuffle-batchnorm study --output runs/study-report --report-only \
		--records benchmarks/results/study.json $(ARGS)

release-check: setup ## build, install into empty environments, try there; RELEASING.md
	$(BIN)/python tests/release_check.py $(PIP_ARGS)

# No setup: they run with whichever Python has torch and pytest (GPU_PYTHON=...).
GPU_CHECK = PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT) $(ARGS)

gpu-test: ## run the tests marked gpu: 90 seconds
	$(GPU_CHECK) test

gpu-bench: ## measure a GPU, the most telling first; print targets: 4 minutes
	$(GPU_CHECK) bench

gpu-check: ## both; OUT=folder gets results and logs
	$(GPU_CHECK) test bench

gpu-study: ## train ResNet-18s with several --bn side by side on a GPU, and say what leaks: 8 minutes
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) benchmarks/gpu_study.py --out $(OUT) $(ARGS)

# All pages anew, since a page that is skipped isn't checked.
docs: setup ## build the site from docs/ into build/site, in seconds; a dead link fails
	$(BIN)/sphinx-build -E -a -q -W --keep-going -d build/doctrees docs build/site
	@echo "Open build/site/index.html"

figures: setup ## draw the pictures of docs/ again
	@set -e; for script in $(sort $(wildcard docs/draw_*.py)); do \
		echo "$$script"; $(BIN)/python "$$script"; done

clean: ## remove what tools have left; .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
