"""What the compose file would run, run here: the installed wheel with the image's and the file's
exact environment and command, beside a real Redis and a real Prometheus with the mounted files.

Mapped: paths of the container to a folder of the test, host names and ports to loopback and free
ports, and the seconds between two scrapes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.base import write_adapters, write_base
from support.compose import compose, image_environment
from support.prometheus import Prometheus, running_prometheus
from support.redis_server import RedisServer
from support.server import Server, free_port, running_command

ADMIN = "an-admin-key-out-of-a-file"
TINY = {"QUANTIZATION": "none", "DTYPE": "fp32", "KERNELS": "torch", "KV_CACHE_MB": "8"}


@dataclass
class Stack:
    """Everything of the compose file but Grafana."""

    server: Server
    redis: RedisServer
    prometheus: Prometheus
    http: httpx.Client
    base: str


@pytest.fixture(scope="session")
def installed(repository, tmp_path_factory) -> Path:
    """The `manyhats` command of the wheel, installed in an environment of its own."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(folder / "venv")}, scheme="venv")
    # what the wheel needs is there already: seen behind the new environment's own packages
    Path(paths["purelib"], "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    wheel = next(folder.glob("*.whl"))
    install = [*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "venv" / "bin" / "manyhats"


@pytest.fixture(scope="session")
def stack(repository, installed, tmp_path_factory) -> Iterator[Stack]:
    """The services, answering and scraped."""
    root = tmp_path_factory.mktemp("stack")
    base = write_base(root / "tiny")
    write_adapters(root / "adapters", base, ("pirate", "legal", "haiku"))
    for name, text in (("admin_api_keys", ADMIN), ("api_keys", "a-tenant-key")):
        (root / name).write_text(f"{text}\n")
    file = compose(repository, TINY | {"MODEL": str(base), "ADAPTERS": str(root / "adapters")})
    service = file["services"]["server-cpu"]
    words = [_mapped(word, {"/data": str(root)}) for word in file["services"]["redis"]["command"]]
    assert words.pop(0) == "redis-server"
    mapped = {
        "/var/lib/manyhats": str(root / "state"),
        "/adapters": str(root / "adapters"),
        "/run/secrets": str(root),
        "0.0.0.0": "127.0.0.1",
        "/opt/manyhats/bin": str(installed.parent),
        "$PATH": os.environ["PATH"],
    }
    dockerfile = (repository / "Dockerfile").read_text("utf-8")
    environment = image_environment(dockerfile, "cpu") | service["environment"]
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    command = [*json.loads(entrypoint), *service["command"]]
    with ExitStack() as running:
        redis = RedisServer(root, arguments=words)
        redis.start()
        running.callback(redis.stop)
        mapped["redis://redis:6379/0"] = redis.url
        env = {name: _mapped(str(value), mapped) for name, value in environment.items()}
        env |= {"MANYHATS_PORT": "0", "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
        program = [str(installed.parent / command[0]), *command[1:]]
        server = running.enter_context(running_command(program, env, cwd=root))
        address = server.base_url.removeprefix("http://")
        prometheus = running.enter_context(_prometheus(repository, file, root, address))
        headers = {"authorization": f"Bearer {ADMIN}"}
        http = httpx.Client(base_url=server.base_url, headers=headers, timeout=60)
        yield Stack(server, redis, prometheus, running.enter_context(http), base.name)


def _prometheus(repository: Path, file, root: Path, address: str):
    """Started with the compose file's command and the mounted configuration."""
    service, port = file["services"]["prometheus"], free_port()
    source = repository / service["volumes"][0].split(":")[0]
    folder = root / "prometheus"
    (folder / "rules").mkdir(parents=True)
    for path in (source / "rules").iterdir():
        (folder / "rules" / path.name).write_text(path.read_text("utf-8"))
    config = (source / "prometheus.yml").read_text("utf-8")
    assert "server:8000" in config
    config = re.sub(r"(interval|timeout): \d+s", r"\1: 500ms", config)
    (folder / "prometheus.yml").write_text(config.replace("server:8000", address))
    mapped = {"/etc/prometheus": str(folder), "/prometheus": str(root / "tsdb")}
    arguments = [_mapped(word, mapped) for word in service["command"]]
    return running_prometheus(arguments, port, root / "prometheus.log")


def _mapped(text: str, mapped: dict[str, str]) -> str:
    words = "|".join(map(re.escape, mapped))
    return re.sub(rf"(?<![\w/.-])(?:{words})(?![\w-])", lambda m: mapped[m[0]], text)
