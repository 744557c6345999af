"""Code that measures and compares models. Training does not use it.

`evaluation` measures one model for `evaluate.py`, `comparison` is the experiment of `compare.py`, and `benchmark` is
what `benchmark.py` times. `speed` times whole training steps for the last two; `gpu.sh` runs what needs a GPU.
"""
