# Every target makes the virtual environment if there is none. PYTHON is the interpreter that it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEVICE ?= cpu

.PHONY: help demo test test-all test-lowest test-triton test-deepspeed test-wheel nightly lint format docs pictures peers bench-optim bench-capture bench-scale gpu ecosystem evidence \
	evidence-full clean

help:
	@echo "make demo    rescue a frozen run, and carry a learning rate to 32 times the batch, on two ranks (under a minute)"
	@echo "             DATA_DIR=... takes the four idx files of Fashion-MNIST instead of the digits (2 minutes)"
	@echo "make test    the tests (some 5 minutes on two cores)"
	@echo "make test-all  the slow ones too: torch's conformance suite, sweeps of kernels, probe and monitor, three ranks, the demo (some 8 minutes)"
	@echo "make nightly the property tests with 12,000 new cases (a minute or two)"
	@echo "make test-lowest  the tests on the lowest versions that pyproject.toml promises (Python 3.11; 7 GB on Linux,"
	@echo "             but for UV_TORCH_BACKEND=cpu, which takes torch's small build)"
	@echo "make test-triton  the kernels interpreted and compiled by Triton 3.6, too (half a minute, after a download of 200 MB)"
	@echo "make test-deepspeed  two ranks under DeepSpeed's ZeRO (two minutes, after its build)"
	@echo "make test-wheel  the wheel holds the package alone, and works in a bare environment (under a minute)"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff put the code into shape"
	@echo "make docs    the docs, site/index.html (some seconds); every warning is an error"
	@echo "make pictures  make the pictures of docs and README again, from small runs (some 3 minutes)"
	@echo "make bench-optim  time and memory of the optimizers' step against their peers (20 minutes on two idle cores)"
	@echo "             DEVICE=cuda measures on a GPU"
	@echo "make bench-capture  what the monitor adds to a training step, against its peers (some 20 minutes on two idle cores)"
	@echo "             DEVICE=cuda measures on a GPU"
	@echo "make bench-scale    bytes that the monitor all-reduces, logs and keeps: model, and check on 8 ranks (3 minutes)"
	@echo "make gpu     all that only a GPU can show: correctness, speed, cost, evidence (8 minutes on a GPU)"
	@echo "             DATA_DIR=... has the four idx files of Fashion-MNIST"
	@echo "make ecosystem  other people's projects with the callbacks in them (an hour, some 30 GB in .ecosystem)"
	@echo "make evidence       redraw the tables and figures of the calibration's evidence (half a minute)"
	@echo "make evidence-full  make the runs that it lacks first (some seven hours on two cores; can be stopped and goes on)"
	@echo "             DATA_DIR=... takes the four idx files of Fashion-MNIST from there"
	@echo "make peers   install those peers that are not ours to depend on"
	@echo "make clean   remove the virtual environments and what demo and docs wrote"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")
	@echo "(tensorboard is at $(BIN)/tensorboard)"

# One thread a process: there is a process for each core, and threads that wait for a busy core cost more than they do.
# Nor has torch's compiler processes of its own, which would import torch each.
# Tests that share what a module's fixture has computed are a group, which one process runs: no two compute it.
ONE_THREAD := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
PARALLEL := --numprocesses auto --dist loadgroup

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest $(PARALLEL)

nightly: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --hypothesis-profile nightly -k test_property tests

# Only the direct dependencies are old. They warn about the newer packages that they import, so warnings are no errors here.
# Left out: what judges torch or Triton of one version, and what is not in the package.
LOWEST := .venv-lowest

$(LOWEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints.txt uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	touch $@

test-lowest: $(LOWEST)/.ready
	$(ONE_THREAD) $(LOWEST)/bin/python -m pytest $(PARALLEL) --override-ini filterwarnings=ignore -m "not slow" \
		--ignore tests/benchmarks --ignore tests/kernels --ignore tests/optim/test_conformance.py

# A Triton that counts in another way; torch 2.11 comes with it. Without torch's CUDA build nothing else would bring it.
TRITON := .triton-3.6

$(TRITON): | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0 numpy==2.2.6  # its interpreter fails with newer ones

test-triton: $(TRITON)
	PYTHONPATH=$(TRITON) $(ONE_THREAD) $(BIN)/python -m pytest $(PARALLEL) tests/kernels

# DeepSpeed is no dependency of ours: it is built from source, and needs what it names here.
DEEPSPEED := .deepspeed

$(DEEPSPEED): | $(READY)
	$(BIN)/python -m pip install --quiet "setuptools<81"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $@ deepspeed==0.19.8 hjson ninja \
		py-cpuinfo msgpack einops psutil pydantic pydantic-core annotated-types typing-inspection

test-deepspeed: $(DEEPSPEED)
	PYTHONPATH=$(DEEPSPEED) $(ONE_THREAD) $(BIN)/python -m pytest tests/distributed/test_deepspeed.py

test-wheel: $(READY)
	$(BIN)/python .ci/wheel.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The docs read the sources and import nothing of the package. The variable hides an advertisement, the path is for ruff.
docs: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

pictures: $(READY)
	PYTHONPATH=examples OMP_NUM_THREADS=1 $(BIN)/python docs/pictures.py

# Without their dependencies: requirements-peers.txt names those that they need.
$(VENV)/.peers: $(READY) benchmarks/requirements-peers.txt
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/requirements-peers.txt
	touch $@

peers: $(VENV)/.peers

# The two log levels keep the notices of torch's profiler out of the report.
bench-optim: $(VENV)/.peers
	KINETO_LOG_LEVEL=6 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python benchmarks/optim_step.py --device $(DEVICE)

bench-capture: $(VENV)/.peers
	$(BIN)/python benchmarks/capture_cost.py --device $(DEVICE)

bench-scale: $(READY)
	$(BIN)/python benchmarks/capture_scale.py

CALIBRATION := PYTHONPATH=benchmarks:examples OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration

# On a bare machine without a registry nothing need be installed: python benchmarks/gpu.py --output DIR
gpu: $(VENV)/.peers
	$(BIN)/python benchmarks/gpu.py $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

# Each project has a virtual environment of its own, in .ecosystem.
ecosystem: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ecosystem/run.py

evidence: $(READY)
	$(CALIBRATION)/tables.py $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

evidence-full: $(VENV)/.peers
	$(CALIBRATION)/grid.py $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")
	$(CALIBRATION)/tables.py --again $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

clean:
	rm -rf $(VENV) $(LOWEST) $(TRITON) $(DEEPSPEED) demo_logs fabric_logs lightning_logs site
