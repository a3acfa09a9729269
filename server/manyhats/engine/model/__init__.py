"""The base model; transformers and bitsandbytes are imported here alone."""
