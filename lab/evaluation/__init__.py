"""Measurements of one trained model.

In the order to read it: `procedure` (from a checkpoint to the figures' file), `estimate` (how long it will take),
`measures` (the whole report), `report` (what it is made of) and `table` (how it is printed), then one file per measure:
`likelihood`, `sliced_wasserstein`, `neighbours`, `by_classifier` (by our own one, for `compare.py`, too),
`feature_distances` (of the features that it or another has), `inception` (FID and KID), `ode_work` (error by solver and
steps), and `tau_maps` (time constants while an image is sampled).
"""
