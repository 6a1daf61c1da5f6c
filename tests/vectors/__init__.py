"""What makes the conformance vectors in data/conformance: `python -m tests.vectors.make_vectors`."""
