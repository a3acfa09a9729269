"""Commands that speak to a running server over its admin API."""
