# make demo      train the addition model, make it sparse, find the circuits of both, draw pictures
# make test      run the tests
# make test-all  those that take minutes, too
# make gpu       what needs a GPU: the kernels' tests, bench.py, 300 steps of two recipes (TEXT=FILE: on it)
# make figures   draw every picture of docs/ again, after training what they show (of texts only baselines)
# make .venv     only install what these need
# make clean     remove the demo's results (not .venv, not other runs)

PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
OUT = out/addition
SHORT = --dataset=gpu --pretrain_steps=300 --sparsify_steps=300 --no-control
NOVELS = $(firstword $(wildcard out/seeds/novels_char_?_threads_seed_100))
PLAYS = $(firstword $(wildcard out/seeds/shakespeare_char_?_threads_seed_100))
PLAYS_8x8 = out/seeds/shakespeare_8x8_1_threads_seed_
SIZES = $(wildcard out/novels_2 out/novels_4 out/novels_8)

.PHONY: demo test test-all gpu figures clean .venv

demo: .venv/installed
	@[ -f data/addition/meta.json ] || $(PY) data/prepare.py addition
	@if [ -f $(OUT)/summary.json ]; then echo "$(OUT) holds trained models: nothing to do (make clean starts over)"; \
	else $(PY) train.py addition $$([ -f $(OUT)/last.pt ] && echo --resume); fi
	@if [ $(OUT)/circuits.json -nt $(OUT)/sparse.pt ]; then echo "$(OUT) has circuits: nothing to do"; \
	else $(PY) circuits.py addition; fi

test: .venv/triton
	$(PY) -m pytest

test-all: .venv/triton
	$(PY) -m pytest -m ""

gpu: .venv/triton
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: PyTorch sees no CUDA device here')"
	$(PY) data/prepare.py text $(or $(TEXT),*.py docs/*.md) --name=gpu --tokenizer=char
	rm -rf out/gpu_char out/gpu_gpt2
	failed=0; \
	$(PY) -m pytest tests/test_fused_attention.py -m "" || failed=1; \
	$(PY) bench.py all --length=1024 || failed=1; \
	$(PY) train.py shakespeare_char_gpu $(SHORT) --out_dir=out/gpu_char || failed=1; \
	$(PY) train.py gpt2 $(SHORT) --out_dir=out/gpu_gpt2 --init_from=scratch --n_layer=12 --n_head=12 \
		--n_embd=768 --learning_rate=6e-4 --gradient_accumulation_steps=2 || failed=1; \
	exit $$failed

figures: demo out/recall/summary.json
	$(PY) circuits.py addition --positions
	$(PY) experiments/circuit_curve.py addition
	cp $(addprefix $(OUT)/,edges.png training.png attention.png) $(OUT)/circuits*.png docs
	$(PY) sample.py $(OUT)/sparse.pt --heads --plot=docs/heads.png
	$(PY) sample.py out/recall/sparse.pt --heads --plot=docs/heads_recall.png
	$(PY) sample.py out/recall/sparse.pt --prompt=c4a1d7b2a --edges=docs/recall_edges.png
	$(PY) experiments/baselines.py $(OUT) out/recall $(NOVELS) --picture=docs/baselines.png
	$(PY) -c "import re; exec('\n'.join(re.findall('^\x60{3}python\n(.*?)^\x60{3}', open('docs/lesson.md').read(), re.M | re.S)))"
	cp out/lesson_*.png docs
	[ ! -f out/heads_8/edges.png ] || cp out/heads_8/edges.png docs/edges_novels.png
	[ ! -f $(PLAYS_8x8)100/edges.png ] || cp $(PLAYS_8x8)100/edges.png docs/edges_shakespeare.png
	[ ! -f $(PLAYS_8x8)101/edges.png ] || cp $(PLAYS_8x8)101/edges.png docs/edges_shakespeare_101.png
	[ -z "$(PLAYS)" ] || { $(PY) circuits.py speaker --bound=0.01 --dense=$(PLAYS)/dense.pt \
		--sparse=$(PLAYS)/sparse.pt && cp $(PLAYS)/speaker/circuits.png docs/circuits_speaker.png; }
	[ -z "$(SIZES)" ] || { $(PY) experiments/growth.py $(SIZES) --picture=docs/growth.png && \
		$(PY) experiments/growth.py $(SIZES) --task=sentence --picture=docs/growth_sentence.png; }

out/recall/summary.json: | .venv/installed
	[ -f data/recall/meta.json ] || $(PY) data/prepare.py recall
	$(PY) train.py recall $$([ -f out/recall/last.pt ] && echo --resume)

.venv: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "error: $(PYTHON) is older than Python 3.10: make PYTHON=/path/to/a/newer/python3"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

# torch's CUDA build brings a Triton of its own; elsewhere its interpreter tests the kernels (Linux has wheels)
.venv/triton: .venv/installed
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0 || echo "note: no triton: some tests are skipped"
	@touch $@

clean:
	rm -rf $(OUT) data/addition
