"""Measurements of one trained model.

In the order to read it: `procedure` (from a checkpoint to the figures' file), `estimate` (how long it will take),
`measures` (the whole report) and `table` (how it is printed), then one file per measure: `likelihood`,
`sliced_wasserstein`, `neighbours`, `feature_distances` (in features of our own classifier), `inception` (FID and KID),
`ode_work` (error by solver and steps), and `tau_maps` (time constants while an image is sampled).
"""
