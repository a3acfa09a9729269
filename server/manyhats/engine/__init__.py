"""The engine: one step loop over a packed batch whose tokens wear different adapters."""
