"""Who proposes the next candidate: a table of samplers, and what they share."""
