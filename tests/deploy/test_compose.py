"""The Dockerfile, the compose file and its variables, without an engine to run them."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from importlib import resources

import jsonschema
import pytest
import yaml
from support.compose import compose, dotenv, image_environment, instructions, stages, variables

from manyhats.config import Settings

SERVERS = ("server-cpu", "server-gpu")


@pytest.fixture(scope="module")
def dockerfile(repository) -> str:
    return (repository / "Dockerfile").read_text("utf-8")


@pytest.fixture(scope="module")
def file(repository):
    return compose(repository)


def test_hadolint_finds_nothing(repository, scripts):
    told = subprocess.run(
        [scripts / "hadolint", "Dockerfile"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_the_images_run_without_root_and_bring_no_source(dockerfile):
    found = stages(dockerfile)
    for target in ("cpu", "cuda"):
        source, lines = found[target]
        assert source == "runtime"
        assert lines[-1] == ("USER", "10001:10001")
        copied = [rest for word, rest in lines + found["runtime"][1] if word in ("COPY", "ADD")]
        assert copied == [f"--from=environment-{target} /opt/manyhats /opt/manyhats"]
    words = [word for word, _ in found["runtime"][1]]
    assert {"HEALTHCHECK", "ENTRYPOINT", "VOLUME", "STOPSIGNAL"} <= set(words)


def test_base_images_and_torch_are_pinned_once(dockerfile, repository):
    lines = instructions(dockerfile)
    (image,) = [rest for word, rest in lines if rest.startswith("PYTHON_IMAGE=")]
    assert re.search(r":\d+\.\d+\.\d+-", image)
    sources = {source for source, _ in stages(dockerfile).values()}
    assert sources <= {"${PYTHON_IMAGE}", "environment", "runtime"}
    pins = {rest.partition("=")[2] for word, rest in lines if rest.startswith("TORCH=")}
    makefile = (repository / "Makefile").read_text("utf-8")
    assert pins == set(re.findall(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE))


def test_every_variable_of_image_and_file_is_a_setting(dockerfile, file):
    known = {f"MANYHATS_{name.upper()}" for name in Settings.model_fields}
    for target, service in (("cpu", "server-cpu"), ("cuda", "server-gpu")):
        env = image_environment(dockerfile, target) | file["services"][service]["environment"]
        ours = {name for name in env if name.startswith("MANYHATS_")}
        assert ours <= known, ours - known
        assert env["MANYHATS_HOME"] == "/var/lib/manyhats"


def test_the_file_fits_the_compose_specification(repository):
    source = resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
    schema = json.loads(source.read_text("utf-8"))
    plain = yaml.safe_load((repository / "docker-compose.yml").read_text("utf-8"))
    check = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in check.iter_errors(plain)] == []
    broken = {"services": {"server": {"image": "x", "read_onyl": True}}}
    assert list(check.iter_errors(broken))  # the schema can refuse


def test_dotenv_has_every_variable_with_its_default(repository):
    text = (repository / "docker-compose.yml").read_text("utf-8")
    example = dotenv((repository / ".env.example").read_text("utf-8"))
    assert example == variables(text)


def test_each_profile_has_one_server_that_the_others_find(file):
    services = file["services"]
    assert [services[name]["profiles"] for name in SERVERS] == [["cpu"], ["gpu"]]
    assert all("profiles" not in s for n, s in services.items() if n not in SERVERS)
    for name in SERVERS:
        assert services[name]["networks"]["default"]["aliases"] == ["server"]
    assert services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]


def test_services_are_confined(file):
    for name, service in file["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
        if name not in SERVERS:
            assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), name


def test_what_is_mounted_exists_and_volumes_and_secrets_are_declared(file, repository):
    used, secrets = set(), set()
    for service in file["services"].values():
        secrets |= set(service.get("secrets", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (repository / source).is_dir(), source
            else:
                used.add(source)
    assert used == set(file["volumes"])
    assert secrets == set(file["secrets"])
    ignored = (repository / ".gitignore").read_text("utf-8").split()
    assert "/secrets/" in ignored
    assert "/.env" in ignored


def test_no_secret_is_a_variable(file):
    for service in file["services"].values():
        for name in service.get("environment", {}):
            secret = re.search(r"KEY|PASSWORD|TOKEN|SECRET", name)
            assert not secret or name.endswith("_FILE"), name


def test_make_secrets_writes_what_is_missing_and_keeps_the_rest(repository, tmp_path, file):
    folder = tmp_path / "secrets"
    script = repository / "deploy" / "make-secrets"
    subprocess.run([script, folder], check=True, capture_output=True)
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(written) == set(file["secrets"])
    assert all(re.fullmatch(r"[0-9a-f]{48}\n", text) for text in written.values())
    assert len(set(written.values())) == len(written)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "api_keys").unlink()
    subprocess.run([script, folder], check=True, capture_output=True)
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {n for n in again if again[n] != written[n]} == {"api_keys"}
    assert Settings(api_keys_file=folder / "api_keys").api_keys
