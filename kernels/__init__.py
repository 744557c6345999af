"""Faster ways to compute what the networks say; each gives the same result as plain torch, up to rounding.

In the order to read it: `compilation` (torch.compile as we use it), `cuda_graph` (a training step as one launch on a
GPU), `native` (our C++ sources as libraries), `convolution` (a 3x3 convolution), `cell_input` (what a liquid cell does
before its ODE) and `liquid_kernel` (the ODE's steps). Of the C++ sources, `winograd.h` is the heart: `convolution.cpp`
and `cell.cpp` are made of it, and it of `vectors.h` and `products.cpp`; `input.cpp` belongs to `cell_input`, and
`amx_cell.cpp` is the cell in bf16 for Intel AMX.
"""
