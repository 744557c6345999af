"""The diffusion process, apart from any network.

In the order to read it: `scheduler` (noise schedules, what a network predicts, the loss), `sampling` (from noise to
images: guidance and the samplers).
"""
