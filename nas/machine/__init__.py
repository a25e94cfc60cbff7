"""The machine: its devices, turns on a device, its description and its limits."""
