"""What every command stands on, and what knows nothing of images or networks.

In the order to read it: `errors` (the two ways to fail), `command_line` (flags, signals, exit codes), `names` (choosing
some of a list), `files` (writing whole files or none), `hardware` (device, memory, arithmetic), `processes` (torchrun),
`progress` (bars, or lines in a log file), `interrupted_import` (at the very start: Ctrl-C, closed streams),
`not_a_package` (what `pip install .` meets).
"""
