"""A model of the scores so far, and the point that it recommends next.

`warp` maps losses to a scale that suits a model, `gp` predicts an objective with an interval, `acquisition` computes
the expected gain in hypervolume of a candidate, `beforehand` tells what is known without scoring, `recommend` generates
candidates and chooses one, and `calibrated` makes predictions with calibrated intervals.
"""
