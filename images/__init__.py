"""Everything that is an image: data sets in, pictures out.

In the order to read it: `datasets` (a set as one uint8 tensor), `sides` (height and width), `folder` (any folder of
images: `layout` finds them, `decode` reads one, `cache` keeps all for the next start), `batches` (what one training
step sees, as a pure function of seed and number), `pictures` (grids, animations, loss curves), `single` (images one by
one, for other programs).
"""
