"""Tenants: who they are, their keys, what they may use, how much, and what they used."""
