"""Adapters: their canonical form, their importers, their bytes, and who sits in which slot."""
