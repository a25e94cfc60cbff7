"""The machine underneath: its devices, turns on a device, what this machine is, and its limits."""
