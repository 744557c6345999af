"""Code that draws from models, measures and compares them. Training does not use it.

`drawing` is what `sample.py` does, `evaluation` measures one model for `evaluate.py`, in the features of a `classifier`
among others, and `predictions` has the flags that both share. `comparison` is the experiment of `compare.py`, and
`benchmark` is what `benchmark.py` times. `speed` times whole training steps for the last two; `gpu.sh` runs what needs
a GPU.
"""
