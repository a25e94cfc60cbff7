"""The door of this repository: `python cli.py COMMAND`, which is the same as the installed `mixnas COMMAND`."""

from nas.commands import main

if __name__ == "__main__":
    main()
