"""Who scores the candidates: this process, a subprocess, other processes on a shared study, or Ray."""
