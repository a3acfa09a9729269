"""The command: every setting is a flag, flags win, mistakes are one line and exit code 2."""

import re
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyhats import __version__, cli
from manyhats.config import Device, Dtype, Quantization, Settings
from manyhats.errors import ConfigError


@pytest.fixture
def served(monkeypatch):
    """`manyhats serve ...` up to the point where the server would start: what it was given."""
    monkeypatch.setenv("COLUMNS", "100")
    for variable in [f"MANYHATS_{name.upper()}" for name in Settings.model_fields]:
        monkeypatch.delenv(variable, raising=False)
    seen = []
    server = types.ModuleType("manyhats.app")
    server.serve = seen.append
    monkeypatch.setitem(sys.modules, "manyhats.app", server)

    def run(*flags):
        seen.clear()
        result = CliRunner().invoke(cli.app, ["serve", *flags])
        return result, (seen[0] if seen else None)

    run.server = server
    return run


def test_without_flags_the_settings_are_the_defaults(served):
    result, settings = served()
    assert result.exit_code == 0, result.output
    assert settings == Settings()


OTHER = {
    "home": "/srv/hats",
    "quantization": "int8",
    "dtype": "fp16",
    "device": "cpu",
    "host": "127.0.0.2",
    "log_level": "debug",
    "log_format": "json",
    "kernels": "torch",
    "max_conversion_error": "0.5",
    "drift_alpha": "0.25",
    "drift_share": "0.25",
    "drift_canary_share": "0.25",
}


SECRET_FILES = {name for name in Settings.model_fields if name.endswith("_file")}


@pytest.mark.parametrize("name", sorted(SECRET_FILES))
def test_a_file_of_secrets_is_a_flag_that_arrives(served, name, tmp_path):
    (tmp_path / "secret").write_text("redis://elsewhere/0\n")
    result, settings = served("--" + name.replace("_", "-"), str(tmp_path / "secret"))
    assert result.exit_code == 0, result.output
    changed = {n for n in Settings.model_fields if getattr(settings, n) != getattr(Settings(), n)}
    assert changed == {name, name.removesuffix("_file")}


@pytest.mark.parametrize("name", [n for n in Settings.model_fields if n not in SECRET_FILES])
def test_every_setting_is_a_flag_that_arrives(served, name):
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        flags = (flag,) if not field.default else ("--no-" + flag[2:],)
    elif "tuple" in str(field.annotation):
        flags = (flag, "/first", flag, "/second")
    elif "str" in str(field.annotation) or name in OTHER:
        flags = (flag, OTHER.get(name, "something"))
    else:
        flags = (flag, "17")
    result, settings = served(*flags)
    assert result.exit_code == 0, result.output
    changed = {n for n in Settings.model_fields if getattr(settings, n) != getattr(Settings(), n)}
    assert changed == {name}


def test_types_of_the_flags(served):
    _, settings = served(
        *("--quantization", "fp4", "--dtype", "fp32", "--device", "cpu", "--drain-s", "2.5"),
        *("--adapter-root", "/a,b", "--adapter-root", "/c d", "--admin-api-keys", "k1"),
        *("--admin-api-keys", "k2"),
    )
    assert (settings.quantization, settings.dtype, settings.device) == (
        Quantization.FP4,
        Dtype.FP32,
        Device.CPU,
    )
    assert settings.adapter_root == (Path("/a,b"), Path("/c d"))
    assert [key.get_secret_value() for key in settings.admin_api_keys] == ["k1", "k2"]
    assert settings.drain_s == 2.5


def test_a_flag_wins_over_the_environment(served, monkeypatch):
    monkeypatch.setenv("MANYHATS_SLOTS", "7")
    monkeypatch.setenv("MANYHATS_MAX_RANK", "8")
    monkeypatch.setenv("MANYHATS_PREFIX_CACHE", "true")
    _, settings = served("--slots", "5", "--no-prefix-cache")
    assert (settings.slots, settings.max_rank, settings.prefix_cache) == (5, 8, False)


def test_help_names_every_flag_with_default_and_bound(served):
    result, _ = served("--help")
    text = re.sub(r"\s+", " ", result.output)
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert str(field.description) in text
    assert "[default: nf4]" in text
    assert "<nf4|fp4|int8|none>" in text
    assert "[default: 32] [1<=x<=4096]" in text
    assert "[default: 0.05] [0<x<1]" in text
    assert "[default: 86400.0] [0<x]" in text
    assert "MANYHATS_MAX_RANK" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--slots", "0"), ["--slots", "1"]),
        (("--slots", "4097"), ["--slots", "4096"]),
        (("--port", "65536"), ["--port", "65535"]),
        (("--slots", "many"), ["--slots", "many"]),
        (("--quantization", "nf5"), ["--quantization", "nf5", "nf4", "int8"]),
        (("--no-such-flag",), ["--no-such-flag"]),
    ],
)
def test_a_bad_flag_is_named_with_its_bound(served, flags, named):
    result, settings = served(*flags)
    assert (result.exit_code, settings) == (2, None)
    assert "Traceback" not in result.output
    for word in named:
        assert word in result.stderr


def test_a_bad_variable_is_named_with_its_bound(served, monkeypatch):
    monkeypatch.setenv("MANYHATS_SLOTS", "0")
    monkeypatch.setenv("MANYHATS_DTYPE", "fp8")
    result, settings = served("--port", "1234")
    assert (result.exit_code, settings) == (2, None)
    assert "MANYHATS_SLOTS: Input should be greater than or equal to 1 (got '0')" in result.stderr
    assert "MANYHATS_DTYPE: Input should be 'bf16', 'fp16' or 'fp32' (got 'fp8')" in result.stderr


def test_a_setting_that_turns_out_wrong_is_one_line(served):
    def refuse(settings):
        raise ConfigError("model: no folder of that name", param="model")

    served.server.serve = refuse
    result, _ = served("--model", "/nowhere")
    assert result.exit_code == 2
    assert result.stderr == "manyhats: model: no folder of that name\n"


def test_any_other_error_is_not_hidden(served):
    def fail(settings):
        raise RuntimeError("a defect")

    served.server.serve = fail
    result, _ = served()
    assert isinstance(result.exception, RuntimeError)


def test_fetch_default_prints_the_folder_alone_on_stdout(monkeypatch, tmp_path):
    def ensure(home):
        sys.stderr.write("[1/3] ...\n")
        return home / "models" / "x"

    monkeypatch.setattr("manyhats.engine.model.default.ensure_default_model", ensure)
    result = CliRunner().invoke(cli.app, ["fetch-default", "--home", str(tmp_path)])
    assert result.stdout.strip() == str(tmp_path / "models" / "x")
    assert result.stderr == "[1/3] ...\n"


def test_build_kernels_names_the_backend_and_the_reason(tmp_path):
    result = CliRunner().invoke(cli.app, ["build-kernels", "--home", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert re.match(r"Kernels: (native|torch) \(.{10,}\)\n$", result.stdout)


def test_unknown_kernels_are_a_config_error(tmp_path):
    import torch

    from manyhats.engine.kernels import resolve_kernels

    with pytest.raises(ConfigError, match=r"kernels: .*'fast'.*reference") as caught:
        resolve_kernels("fast", device=torch.device("cpu"), home=tmp_path)
    assert caught.value.param == "kernels"


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="manyhats")
    assert script.load() is cli.main


def test_help_does_not_wait_for_torch():
    """`python -m manyhats serve --help` answers without the libraries that take seconds."""
    code = (
        "import sys; sys.argv = ['manyhats', 'serve', '--help']\n"
        "from manyhats.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version():
    done = subprocess.run(
        [sys.executable, "-m", "manyhats", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == __version__ + "\n"
