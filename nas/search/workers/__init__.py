"""Who scores the candidates: this process, a subprocess, other processes on a shared study, or Ray.

- `claims`: which worker has which point, and what happens when a worker dies.
- `shared`: the trials of a process that shares its study with others.
- `executors`, `engines`: the protocol of what scores, and the table of those that a search may use.
- `isolated`: scoring in a subprocess, so that a crash ends only the trial.
- `local`, `worker`: the processes of `--workers N`, and their entry point.
- `ray`: scoring on a Ray cluster.
"""
