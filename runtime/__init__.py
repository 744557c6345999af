"""What every command stands on, and what knows nothing of images or networks.

In the order to read it: `errors` (the two ways to fail), `command_line` (flags, signals, exit codes), `files` (writing
whole files or none), `hardware` (device, memory, arithmetic), `processes` (torchrun), `interrupted_import` (Ctrl-C
while torch is imported), `not_a_package` (what `pip install .` meets).
"""
