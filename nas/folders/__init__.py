"""The folders on disk. Each kind of folder has one module that reads and writes it."""
