"""`python -m nas COMMAND`, the same as `mixnas COMMAND`: for what starts modules, such as `torchrun -m nas`."""

from .commands import main

main()
