"""Shared by the servers: settings, the rows of a step, counters."""
