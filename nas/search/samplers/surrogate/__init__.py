"""A model of what was scored so far, and the next point it recommends.

`gp` predicts an objective with an interval, `acquisition` says what a candidate may add to the hypervolume, `sampler`
makes the candidates and chooses one.
"""
