"""Hosts that can run their models with Stem; each module needs its host installed."""
