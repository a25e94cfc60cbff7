"""The storage of a study: an SQLite file, a database server or a proxy. Waits out outages, and serves a storage."""
