"""Where a study lives: an SQLite file, a database server or a proxy; waiting out outages, and serving."""
