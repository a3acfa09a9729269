"""Evaluations: what a version is measured on, how it is judged, and what promotion asks of it."""
