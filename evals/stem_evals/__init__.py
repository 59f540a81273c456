"""Real models and prompts: load them, prefill them dense and sparse, compare."""
