"""The base model; transformers and bitsandbytes are imported here alone."""

import logging

# bitsandbytes advises at import to fetch a kernel from a hub; this server runs no code of a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
