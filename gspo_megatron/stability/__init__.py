"""What a run measures and how it is shown. Runs no model."""
