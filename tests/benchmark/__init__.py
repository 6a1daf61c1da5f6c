"""How fast, how much memory, against what: ratios measured side by side. `python -m tests.benchmark`."""
