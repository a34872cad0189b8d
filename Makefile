# Every target sets up what it needs: a .venv here, guests in guests/. Nothing is installed into the system.
PYTHON ?= python3
BIN := .venv/bin
GUEST := guests/debian

# The tests start a thousand processes: each would compile every module anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: venv demo test test-full mutants test-kvm-emulated bench lint guest clean

.venv/done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anyhyve needs Python 3.11 or newer")'
	@$(PYTHON) -m venv .venv || { echo "make: this Python has no venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

venv: .venv/done

# A machine without apt-get or network still runs everything that needs no Debian guest; what is skipped says so.
guest: .venv/done
	-$(BIN)/anyhyve guest fetch --dir $(GUEST)

demo: guest
	$(BIN)/python -m bench.demo --guest $(GUEST)

# A worker for each processor; a file's tests stay together, for they share what takes long to make. The files come in
# the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: guest
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# The long campaign. What has no build for every Python is an extra: where there is none the test says so.
FUZZ_SECONDS ?= 600
MUTANTS ?= 60
MUTANTS_SECONDS ?= 1200
test-full: guest
	-$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	-$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dask]'
	-$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(PYTEST) --hypothesis-profile=nightly $(PYTEST_ARGS)
	$(BIN)/anyhyve fuzz all --seconds $(FUZZ_SECONDS)
	$(MAKE) mutants MUTANTS_ARGS="--count $(MUTANTS) --seconds $(MUTANTS_SECONDS)"

# Faults planted at random, and whether the tests of their folder find them.
mutants: guest
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

# The KVM tests where there is no virtualization hardware: QEMU emulates it (Debian: qemu-system-x86, busybox-static).
test-kvm-emulated: guest
	$(BIN)/python -m tests.emulated_kvm $(LANE_ARGS)

bench: guest
	$(BIN)/python -m bench.boot --guest $(GUEST)
	$(BIN)/python -m bench.smp --guest $(GUEST)
	$(BIN)/python -m bench.save_restore --guest $(GUEST)
	$(BIN)/python -m bench.checkpoint --guest $(GUEST)
	$(BIN)/python -m bench.plugin --guest $(GUEST)
	$(BIN)/python -m bench.reset
	$(BIN)/python -m bench.port_read
	$(BIN)/python -m bench.kvm_exit
	$(BIN)/python -m bench.kvm_restore
	$(BIN)/python -m bench.kvm_threads

lint: .venv/done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv guests demo dist
