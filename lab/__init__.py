"""Code that draws from models, measures and compares them. Training does not use it.

`drawing` is what `sample.py` does, `evaluation` measures one model for `evaluate.py`, in the features of a `classifier`
among others, and `predictions` has the flags that both share. `comparison` is the experiment of `compare.py`, and
`benchmark` is what `benchmark.py` times. `export` writes a model as ONNX files for `export.py`. `speed` times whole
training steps for the comparison and the benchmark; `gpu.sh` runs what needs a GPU.
"""
