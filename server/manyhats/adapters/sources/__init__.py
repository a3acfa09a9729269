"""Adapters from elsewhere: the Hugging Face hub, web servers, object stores; only where allowed."""
