# make demo     everything from nothing: text, a source model, pruning, training on with and without the method,
#               evaluation, pictures. It takes about ten minutes on two CPU cores. Run it again to go on where it was.
# make tour     the figures, quotes and notebook of docs/tour.md, after make demo
# make test     lint and tests, from nothing
# make bench    is it fast? All that has a bound, beside what it is compared with
# make compare  the schedules against each other, with several seeds. It takes hours. Run it again to go on where it was.
# make clean    remove what demo and test have made
#
# All but clean first make a virtual environment in .venv and install requirements.txt there, if it is not there yet.
# On Linux, pip takes torch's CUDA build, which is some GB large. If torch's CPU build is installed there, it is enough.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO = out/toy_pretrain out/toy_prune out/toy_constant out/toy_continue
export PYTHONUNBUFFERED = 1

.PHONY: demo tour test bench compare clean

demo: $(VENV)/done
	$(RUN) prepare_data.py installed --out data/demo --held_out 0.1
	$(RUN) train.py config/toy_pretrain.py
	$(RUN) train.py config/toy_prune.py
	$(RUN) train.py config/toy_continue.py --schedule constant --out out/toy_constant
	$(RUN) train.py config/toy_continue.py
	$(RUN) eval.py $(DEMO) --data data/demo --sequences 64 --json out/demo.json
	$(RUN) plot.py out/toy_continue out/toy_constant

tour: $(VENV)/done
	$(RUN) experiments/tour.py

test: $(VENV)/done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=2 $(RUN) -m pytest

bench: $(VENV)/done
	$(RUN) experiments/bench.py

compare: $(VENV)/done
	$(RUN) experiments/compare.py toy

$(VENV)/done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) data/demo $(DEMO) out/demo.json
