"""Whatever listens to a run."""
