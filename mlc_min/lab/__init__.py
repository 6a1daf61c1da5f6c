"""The embedded world: its sentences, its base model, and the experiment on it."""

import sys

from mlc_min.machinery.errors import run_command
from mlc_min.machinery.files import EMBEDDED, shipped

if sys.argv[0] == "-m":  # as it reads while Python looks for the module of `python -m mlc_min.lab.ablations`
    run_command(lambda: shipped(EMBEDDED))  # data that are not there are one line, before any traceback
