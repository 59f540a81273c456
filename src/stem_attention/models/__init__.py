"""Load a real model, a prompt and a text; prefill dense and sparse and compare."""
