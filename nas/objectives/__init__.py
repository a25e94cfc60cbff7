"""Objectives of a search, Pareto mathematics, agreement of two orders, and formatting of figures."""
