# Two commands matter: `make demo` and `make test`, which runs the quick tests. Each installs what it needs into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTING := $(VENV)/.testing
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

# `verify` follows the drift for 16,000 positions, in both modes; here it is to be quick.
DRIFT := --horizon 4000 --free-horizon 1000

.PHONY: demo test test-all coverage kernels lint bench precision scale gpu install clean

demo: kernels
	$(BIN)/xlstm-export deploy examples/austen_lm \
	    --precision int8 --recipe examples/austen_lm/int8.yaml --calib calibration/sets/austen_lm.txt \
	    --data examples/austen_lm/heldout.txt $(DRIFT) -o out/austen_lm --force
	$(BIN)/xlstm-export deploy --module examples.weather_forecaster.model:build \
	    --weights examples/weather_forecaster/model.safetensors \
	    --precision int8 --recipe examples/weather_forecaster/int8.yaml \
	    --calib calibration/sets/weather_forecaster.npz \
	    --data examples/weather_forecaster/heldout.npz $(DRIFT) -o out/weather_forecaster --force

# Tests in two tiers. Workers start with half of the tests each, in the order of names, and then take work from each
# other; what several need is made once and shared on disk.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: lint kernels
	$(PYTEST) -m "not slow"

test-all: lint kernels
	$(PYTEST) --durations=25

# Lines and branches that the quick tests run, processes that they start included.
coverage: kernels $(TESTING)
	rm -rf .cache/coverage; mkdir -p .cache/coverage
	$(BIN)/coverage run $(PYTEST:$(BIN)/python%=%) -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The recurrences as fused operators, compiled once into ~/.cache/xlstm_export. Exit code 3: there is no compiler
# here, and function bodies run instead.
kernels: $(INSTALLED)
	$(BIN)/xlstm-export plugins build --only ort-cpu || test $$? -eq 3

NATIVE = $(shell find plugins tests/plugins benchmarks/gpu -regex '.*\.\(h\|hpp\|cc\|cpp\|cu\|cuh\)')

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python tests/imports.py

# The 120M-parameter figures of docs/numbers.md; several minutes, several GB of disk and memory.
bench: kernels
	$(BIN)/python benchmarks/cpu_operators.py --out benchmarks/results/cpu_operators.json
	$(BIN)/python benchmarks/decode_120m.py --out benchmarks/results/cpu.json
	$(BIN)/python benchmarks/decode_120m.py --decode-only --out benchmarks/results/int8.json
	$(BIN)/python benchmarks/answers.py --out benchmarks/results/answers.json
	$(BIN)/python benchmarks/readme.py

# Size, task metric and drift of the examples in every precision; several minutes.
precision: $(INSTALLED)
	$(BIN)/python benchmarks/task_metrics.py --out benchmarks/results/precision.json
	$(BIN)/python benchmarks/readme.py

# Export and verification of 1.3B and 7B parameters; half an hour, 45 GB of disk.
scale: $(INSTALLED)
	$(BIN)/python benchmarks/export_scale.py --out benchmarks/results/scale.json
	$(BIN)/python benchmarks/readme.py

# The kernels on this machine's GPU: built, checked, sanitized, timed; under 8 minutes. Nothing is installed:
# nvcc and a PYTHON with torch are enough. `OUT=folder make gpu` puts the result there, as a machine with a GPU is
# often another one than that of the checkout; copy it to benchmarks/results and run benchmarks/readme.py.
gpu:
	$(PYTHON) benchmarks/gpu/gpu.py $(if $(OUT),--out $(OUT)/gpu.json)
	$(if $(OUT),,$(PYTHON) benchmarks/readme.py)

install: $(TESTING)

# What the tool needs; and with what its tests need, NVIDIA's builder for one, which is half as large again.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[build,cpu,models]"
	touch $@

$(TESTING): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps tirex-2 flashrnn # without Triton, 1 GB that only CUDA uses
	touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
