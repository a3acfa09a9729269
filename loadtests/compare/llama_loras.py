"""Converts many adapters to GGUF in one process of llama.cpp's environment.

    python llama_loras.py LLAMA_CPP_SOURCE BASE_FOLDER ADAPTER_FOLDER=FILE.gguf ...

``convert_lora_to_gguf.py`` takes one adapter a run, and most of a run is importing torch and
transformers; here it is run again and again in one interpreter. A file that is there is kept.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> int:
    """The command line."""
    source, base, *pairs = sys.argv[1:]
    script = str(Path(source) / "convert_lora_to_gguf.py")
    sys.path[0] = source  # in the place of this folder, whose modules are not meant
    for number, pair in enumerate(pairs, 1):
        adapter, _, out = pair.rpartition("=")
        if Path(out).exists():
            continue
        part = Path(out).with_suffix(".part")
        sys.argv = [script, adapter, "--base", base, "--outfile", str(part), "--outtype", "f16"]
        runpy.run_path(script, run_name="__main__")
        part.rename(out)
        print(f"{number} of {len(pairs)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
