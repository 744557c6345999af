"""A small classifier of a data set, in whose features `evaluate.py` and `compare.py` compare samples with images.

In the order to read it: `network` (the convolutions and their file), `training` (half an hour on two cores), and
`__main__`, the command `python -m lab.classifier`.
"""
