# make demo: train on digits for two minutes and draw a grid.   make test: style, types and tests.
# make web: build the page in which the liquid draws (needs Node) and serve it on http://127.0.0.1:8000
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
PORT ?= 8000
PUBLISHED := $(filter-out pretrained/classifier-%,$(wildcard pretrained/*.safetensors))
EXPORTED := $(PUBLISHED:pretrained/%.safetensors=exported/%/model.json)

# --no-compile: Python compiles a module when it is first imported; pip would compile all of torch at once,
# which takes it as long as the rest of the installation
INSTALL := -m pip install --quiet --no-compile

.PHONY: demo web check test test-web clean

demo: $(VENV)/.run
	$(VENV)/bin/python train.py --dataset digits --image-size 16 --batch-size 64 --minutes 2 --output-dir $(DEMO)
	$(VENV)/bin/python sample.py --checkpoint "$$(ls -d $(DEMO)/*-true-digits | tail -n 1)" \
		--output $(DEMO)/digits.png

web: web/dist/index.html
	$(VENV)/bin/python -m http.server $(PORT) --bind 127.0.0.1 --directory web/dist

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror kernels/*.cpp kernels/*.h tests/*.cpp
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile
	@if command -v npm > /dev/null; then $(MAKE) -j 2 test-web; else echo "The page was not tested: it needs Node."; fi

test-web: web/dist/index.html
	cd web && npx prettier --check .
	cd web && PYTHON=$(abspath $(VENV))/bin/python node --test --test-reporter=spec --test-concurrency=1 test/

web/dist/index.html: $(EXPORTED) $(wildcard web/page/*) web/build.mjs web/node_modules/.package-lock.json
	node web/build.mjs

exported/%/model.json: pretrained/%.safetensors export.py $(wildcard lab/export/*.py) $(VENV)/.export
	OMP_NUM_THREADS=1 $(VENV)/bin/python export.py --checkpoint $< --output $(@D)

web/node_modules/.package-lock.json: web/package.json web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

$(VENV)/.run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-compare.txt requirements-export.txt $(VENV)/.run
	$(VENV)/bin/python $(INSTALL) -r requirements-dev.txt
	touch $@

$(VENV)/.export: requirements-export.txt $(VENV)/.run
	$(VENV)/bin/python $(INSTALL) -r requirements-export.txt
	touch $@

clean:
	rm -rf $(VENV) runs exported web/dist web/node_modules
