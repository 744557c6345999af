"""Training one model into a run folder.

In the order to read it: `config` (what decides a run), `loop` (what happens, step by step), `step` (one batch),
`state` (what changes), `start` (from the weights of another run), `compute` (precision and compilation), `optimizer`,
`validation` (what judges a run), `run_log`, `run_folder` and `checkpoint` (what a run leaves on the disk), `summary`
(what it prints before it trains).
"""
