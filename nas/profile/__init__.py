"""Measures the pieces of a search space on a device, for the latency model."""
