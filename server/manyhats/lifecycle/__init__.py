"""Names of adapters, their versions, and what a request is resolved to."""
