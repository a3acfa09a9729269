"""Manyhats: one base model, many hats. A multi-tenant adapter inference server."""

__version__ = "0.1.0"
