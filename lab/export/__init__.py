"""A trained model as ONNX files, to be used without torch.

In the order to read it: `graphs` (which parts of a model become a graph each, and how), `files` (what is written, with
a description from which another program can draw), and `draw`, such a program: it needs onnxruntime and numpy alone,
imports nothing of this project, and is written beside the files as their example.
"""
