"""The experiment on a published model, which nobody made for it: `python -m mlc_min.lab.published`."""
