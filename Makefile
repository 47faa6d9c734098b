# make demo      train the addition model, make it sparse, find the circuits of both, draw pictures
# make test      run the tests
# make test-all  those that take minutes, too
# make .venv     only install what these need
# make clean     remove the demo's results (not .venv, not other runs)

PYTHON ?= python3
# a run that began and has no summary was interrupted: go on with it
INTERRUPTED = $(if $(wildcard out/addition/summary.json),,$(if $(wildcard out/addition/last.pt),--resume))

.PHONY: demo test test-all clean

demo: .venv/installed
	@if [ -f data/addition/meta.json ]; then echo "data/addition is there: reused"; \
	else .venv/bin/python data/prepare.py addition; fi
	@.venv/bin/python train.py addition $(INTERRUPTED)
	@.venv/bin/python circuits.py addition

test: .venv/installed
	@# torch's CUDA build brings a Triton of its own; elsewhere its interpreter tests kernels.py (there are wheels for Linux)
	@.venv/bin/python -c 'import triton' 2>/dev/null || \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0 || \
	echo "note: no triton here: the tests of kernels.py are skipped"
	.venv/bin/python -m pytest

test-all: .venv/installed
	.venv/bin/python -m pytest -m "slow or not slow"

.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "error: $(PYTHON) is older than Python 3.10: make PYTHON=/path/to/a/newer/python3"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf out/addition data/addition
