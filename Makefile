# make demo   set up .venv, then dense and sparse attention on one prompt with the built-in model: a page to open
# make test   set up .venv, then lint, types, layer contracts, the documentation site and tests
# make docs   the documentation site, into out/site; a broken link or a missing name fails
# make wheel  build the wheel, install it in an environment of its own, and use it there
# make coverage    the tests of core, backends and models, and the lines that they do not reach
# make test-diffusers VERSION=0.42.0   the tests of models with another release of diffusers
# make bench  set up .venv, then ours and the baselines on this CPU, and the pages
# make pages  the generated pages and charts of docs/, from the records
# make bench-gpu   the same on a CUDA machine; needs Python and PyTorch only, no network
# make tune-gpu    search FlexAttention's options for that machine
# make check-gpu   outputs and gradients of every backend there against float64
# make layer-gpu   a layer with the shape of Wan 14B at 720p; needs diffusers
# make model-gpu   the built-in model, dense and sparse; needs the package with its dependencies
# A second call reuses the set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint types contracts docs tests wheel coverage test-diffusers bench pages bench-gpu tune-gpu check-gpu layer-gpu model-gpu clean

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (torch, diffusers and the development tools; a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# The prompt is not the best one but the median by SSIM: python -m benchmarks.choose_demo
demo:
	@echo "When this is done, open out/demo/compare.html in a browser: dense and sparse attention, side by side"
	@$(MAKE) --no-print-directory $(READY)
	$(BIN)/nabla compare --prompt "a small purple square moving up on a white background" --seed 9 \
		--sparse-algo topk-0.07_sta-17-1-1_tail-first --sparse-algo topk-0.07_tail-first --rounds 3 --overwrite --output out/demo

test: lint types contracts docs tests

lint: $(READY)
	@echo "Lint"
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/codespell
	$(BIN)/python docs/words.py

types: $(READY)
	@echo "Types"
	$(BIN)/mypy

contracts: $(READY)
	@echo "Layer contracts"
	$(BIN)/lint-imports

docs: $(READY)
	@echo "Documentation site"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tests: $(READY)
	@echo "Tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

wheel: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

coverage: $(READY)
	$(BIN)/python -m pytest tests/core tests/backends tests/models --cov=nabla_attn.core \
		--cov=nabla_attn.backends --cov=nabla_attn.models --cov-fail-under=95 \
		--cov-report=term-missing:skip-covered

test-diffusers: $(READY)
	$(if $(VERSION),,$(error Which release? make test-diffusers VERSION=0.42.0))
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(VENV)/diffusers-$(VERSION) diffusers==$(VERSION)
	PYTHONPATH=$(VENV)/diffusers-$(VERSION) $(BIN)/python -c \
		"import diffusers; assert diffusers.__version__ == '$(VERSION)', diffusers.__version__"
	PYTHONPATH=$(VENV)/diffusers-$(VERSION) $(BIN)/python -m pytest tests/models -m "not gpu"

bench: $(READY)
	$(BIN)/python -m benchmarks.suite --device cpu
	$(MAKE) pages

pages: $(READY)
	$(BIN)/python -m benchmarks.pages

bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.suite --device cuda --budget 400

tune-gpu:
	PYTHONPATH=src $(PYTHON) -m nabla_attn.bench.tune --device cuda --budget 400

check-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu correctness

layer-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu layer

model-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu model

clean:
	rm -rf $(VENV) out
