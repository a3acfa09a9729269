"""Drift: what finished requests look like now, against what they looked like at the promotion."""
