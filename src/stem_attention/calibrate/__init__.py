"""Head factors for one model."""
