"""Everything that is an image: data sets in, pictures out.

In the order to read it: `datasets` (a set as one uint8 tensor), `folder` (any folder of images), `batches` (what one
training step sees, as a pure function of seed and number), `pictures` (grids, animations, loss curves).
"""
