"""The embedded world: its sentences, its base model, and the experiment on it."""
