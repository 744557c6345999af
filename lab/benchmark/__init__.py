"""What `benchmark.py` times.

In the order to read it: `procedure` (one section after the other), `sections` (one function per section of the report),
`peers` (torchdiffeq and ncps), `convolutions` (the convolutions of a training step by themselves), `kernels` (our C++
kernels against torch), `processes` (what needs processes of its own: peak memory, two processes, whole commands),
`report`.
"""
