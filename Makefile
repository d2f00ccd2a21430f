# make demo   train the small GPT, generate from it, print the kernel table, write report.html
# make test   the whole suite; no GPU needed
# Both make .venv first. Already have torch?  make demo VENV=$VIRTUAL_ENV PINS=
PY ?= python3
VENV ?= .venv
PINS ?= constraints.txt
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastlm-installed
DEV_STAMP := $(VENV)/.fastlm-dev-installed
FASTLM := $(BIN)/fastlm

.PHONY: demo test check compile bench snapshot docs wheel ci clean

# The stamps are touched last: an install that was killed half-way is done again.
$(STAMP): pyproject.toml $(PINS)
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv $(VENV)
	@echo "Installing into $(VENV) (once)"
	@$(BIN)/python -m pip install -q $(if $(PINS),-c $(PINS)) -e ".[test]"
	@touch $@

$(DEV_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -q $(if $(PINS),-c $(PINS)) -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@rm -rf runs/demo
	$(FASTLM) train --out runs/demo --steps 1200 --lr 3e-3 --warmup 100 --log-every 50 --eval-every 400
	$(FASTLM) generate --checkpoint runs/demo --prompt "def " --max-new-tokens 300 --num-samples 2 \
		--temperature 0.8 --top-p 1 --seed 1
	$(FASTLM) bench static --html report.html --run runs/demo

test: $(STAMP)
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

compile: $(STAMP)
	$(BIN)/pytest -q tests/test_compile.py $(ARGS)

bench: $(STAMP)
	$(FASTLM) bench $(ARGS)

snapshot: $(STAMP)
	$(FASTLM) bench snapshot --update

docs: $(STAMP)
	$(FASTLM) bench docs

wheel: $(DEV_STAMP)
	rm -rf dist
	$(BIN)/python -m build -q --outdir dist .

ci: check test

clean:
	rm -rf $(VENV) build dist report.html runs *.egg-info src/*.egg-info
