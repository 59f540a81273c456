"""The command stem-evals."""
