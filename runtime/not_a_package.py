"""The build backend that `pip install .` meets: it says in one line that there is nothing to install."""

import sys


def __getattr__(hook: str):
    sys.exit("These are scripts to clone, not a package to install: pip install -r requirements.txt; see README.md")
