"""The experiment of `compare.py`: several arms, each trained with several seeds, all at the same budget.

In the order to read it: `procedure` (from the costs of the arms to the table), `experiment` (what one training run is),
`jobs` (several runs at a time), `samples` (what the arms draw, and how far that is from held-out images), `verdict`
(tables, intervals, curves), `wiener` (the best linear denoiser, in closed form).
"""
