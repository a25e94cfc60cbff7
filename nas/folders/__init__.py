"""Everything that is written to disk: each kind of folder with its only reader and writer."""
