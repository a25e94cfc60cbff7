"""A model of the scores so far, and the point that it recommends next.

`gp` predicts an objective with an interval, `acquisition` computes the expected gain in hypervolume of a candidate,
`recommend` generates candidates and chooses one, and `calibrated` makes predictions with calibrated intervals.
"""
