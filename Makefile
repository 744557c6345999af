# make demo: train on digits for two minutes and draw a grid.   make test: style, types and tests.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo

.PHONY: demo check test clean

demo: $(VENV)/.run
	$(VENV)/bin/python train.py --dataset digits --image-size 16 --batch-size 64 --minutes 2 --output-dir $(DEMO)
	$(VENV)/bin/python sample.py --checkpoint "$$(ls -d $(DEMO)/*-true-digits | tail -n 1)" \
		--output $(DEMO)/digits.png

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror kernels/*.cpp kernels/*.h tests/*.cpp
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

$(VENV)/.run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-compare.txt $(VENV)/.run
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs
