"""The HTTP surface; FastAPI lives here and in the composition root alone."""
