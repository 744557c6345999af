"""Faster ways to compute what the networks say; each gives the same result as plain torch, up to rounding.

In the order to read it: `compilation` (torch.compile as we use it), `cuda_graph` (a training step as one launch on a
GPU), `liquid_kernel` (a liquid cell in C++, for CPUs with AMX) and its source, `liquid_kernel.cpp`.
"""
