"""For a version of the losses in another framework: the loss in NumPy and JAX, and cases that check any version."""
