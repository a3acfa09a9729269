"""The device side of an adapter's parts: one file a kind of site, all of the same small shape."""
