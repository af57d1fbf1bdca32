# Needs python3, make and git. The first target that needs packages creates .venv and installs them; the stamps in .venv then
# skip set-up until a requirements file changes.

VENV := .venv
BIN := $(VENV)/bin
HOST := 127.0.0.1
PORT := 5000
UV := uv==0.13.8
.DEFAULT_GOAL := help

# A prompt is data. $(value) keeps make from expanding its $, the environment keeps the shell from reading its quotes.
export CLIPGEN_PROMPT := $(value PROMPT)
unexport PROMPT
MAKEOVERRIDES =

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# --- environment -----------------------------------------------------------------------------------------------------------

# uv is faster; pip is the fallback if uv is missing or fails.
define install
	@[ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1)
endef

$(BIN)/python:
	@python=; for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; \
		then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "clipgen needs Python 3.11 to 3.14; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "$$python cannot create virtual environments: its 'venv' or 'ensurepip' module is missing." >&2; \
		echo "On Debian and Ubuntu: sudo apt install python3-venv. Then run make again." >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version) ..."; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The project itself is installed editable, so that `python train/stage1.py` finds clipgen and train from anywhere.
$(VENV)/.run: requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements.txt into $(VENV) (PyTorch is large: minutes on a slow line) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV) || echo "uv is not available: using pip."
	$(call install,-r requirements.txt)
	$(call install,--no-deps -e .)
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-train.txt $(VENV)/.run
	@echo "Installing requirements-dev.txt into $(VENV) ..."
	$(call install,-r requirements-dev.txt)
	@touch $@

setup: $(VENV)/.dev ## create .venv with everything: run, train, test

# --- use -------------------------------------------------------------------------------------------------------------------

predict: .prompt $(VENV)/.run ## PROMPT="a lemon" [ARGS="--num-outputs 4 --seed 7"]: generate images
	@$(BIN)/python -m clipgen generate $(ARGS) -- "$$CLIPGEN_PROMPT"

.prompt:
	@[ -n "$$CLIPGEN_PROMPT" ] || { echo 'PROMPT is empty. Try: make predict PROMPT="a lemon"' >&2; exit 2; }

serve: $(VENV)/.run ## Cog's HTTP server with predict.py [HOST=127.0.0.1 PORT=5000]
	@exec $(BIN)/python serve.py --host $(HOST) --port $(PORT)

$(VENV)/.app: requirements-app.txt $(VENV)/.run
	@echo "Installing requirements-app.txt into $(VENV) ..."
	$(call install,--no-deps -r requirements-app.txt)
	@touch $@

PAGE_PORT := 7860

app: $(VENV)/.app ## the web page [HOST=127.0.0.1 PAGE_PORT=7860 ARGS="--weights DIR"]
	@exec $(BIN)/python -m clipgen app --host $(HOST) --port $(PAGE_PORT) $(ARGS)

# --- check -----------------------------------------------------------------------------------------------------------------

# A worker per core; the tests of a file stay together, since they share servers and trainings.
PARALLEL := -n auto --dist loadfile

test: $(VENV)/.dev ## the fast suite: offline, CPU [ARGS="-k gpt"]
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-levels: $(VENV)/.dev ## the numeric tests under each lower instruction set of this CPU
	@$(BIN)/python .ci/levels

test-slow: $(VENV)/.dev ## the slow suite
	@$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

# Installs Debian's Chromium if it is missing and apt-get works, else Playwright's; prints a message if both fail.
test-browser: $(VENV)/.dev $(VENV)/.app ## the web page, in Chromium
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo "No Chromium here: installing it ..."; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	} || $(BIN)/python -m playwright install chromium \
		|| { echo "These tests need Chromium. On Debian: sudo apt install chromium" >&2; exit 1; }
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" tests/integration/test_app_server.py tests/integration/browser $(ARGS)

lint: $(VENV)/.dev ## ruff, mypy and the order of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev ## apply ruff's fixes and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# --- measure and train -----------------------------------------------------------------------------------------------------

gpu-check: $(VENV)/.dev ## checks and timings on a GPU, six minutes [ARGS="--device cpu"]: tables in runs/gpu-check
	@$(BIN)/python benchmarks/gpu_check.py --out runs/gpu-check $(ARGS)

bench: $(VENV)/.dev ## latency, throughput of the server, the mini model's quality (half an hour; after `make renders`, with WordNet)
	@$(BIN)/python benchmarks/end_to_end.py
	@$(BIN)/python benchmarks/serving.py --clients 1 8
	@$(BIN)/python benchmarks/mini_quality.py --per-kind 10

EMOJI := @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0

renders: $(VENV)/.dev ## what the mini model's scenes are made of: emoji art from npm, to data/emoji/renders; needs npm
	npm install --no-fund --no-audit --prefix data/npm $(EMOJI)
	$(BIN)/python -m train.mini.renders --npm data/npm/node_modules --out data/emoji

scenes: renders ## a contact sheet of the scenes, outputs/scenes.png
	$(BIN)/python -m train.mini.sheet --data data/emoji --out outputs/scenes.png

mini: renders ## train the mini model to weights/mine; rerun to resume [MINUTES=60 per part]; needs WordNet (wordnet-base)
	$(BIN)/python -m train.mini.recipe --data data/emoji --out weights/mine $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

clean: ## remove caches and build products; keeps .venv, data, runs and outputs
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .cog *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: gpu-check help setup predict .prompt serve app test test-slow test-levels test-browser lint format bench renders scenes mini clean
