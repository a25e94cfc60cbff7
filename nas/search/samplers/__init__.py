"""Samplers propose the next candidate: their table, and what they share."""
