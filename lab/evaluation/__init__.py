"""Measurements of one trained model.

In the order to read it: `procedure` (from a checkpoint to the figures' file), `measures` (the whole report) and `table`
(how it is printed), then one file per measure: `likelihood`, `sliced_wasserstein`, `neighbours`, `inception` (FID and
KID), `ode_work` (error by solver and steps), and `tau_maps` (time constants while an image is sampled).
"""
