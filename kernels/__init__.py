"""Faster ways to compute what the networks say; each gives the same result as plain torch, up to rounding.

In the order to read it: `compilation` (torch.compile as we use it), `cuda_graph` (a training step as one launch on a
GPU), `native` (our C++ sources as libraries), `convolution` (a 3x3 convolution in C++) and `liquid_kernel` (a liquid
cell in C++). Of the sources, `winograd.h` is the heart: `convolution.cpp` and `cell.cpp` are made of it, it is made of
`vectors.h` and `products.cpp`; `input.cpp` is a cell's input, and `amx_cell.cpp` the cell in bf16 for Intel AMX.
"""
