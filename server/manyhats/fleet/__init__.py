"""Many servers as one: who answers what, and an application for Ray Serve."""
