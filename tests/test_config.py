"""The settings: read from the environment, bounded, frozen; secrets stay unseen."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from manyhats.config import Quantization, Settings, unknown_variables


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No MANYHATS_ variable of the caller's reaches these tests."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MANYHATS_{name.upper()}", raising=False)


def test_defaults_bind_to_loopback_without_keys():
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.quantization is Quantization.NF4
    assert settings.api_keys == settings.admin_api_keys == ()


def test_every_field_says_what_it_is():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_every_number_has_a_lower_bound():
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float, int | None, float | None):
            assert any(hasattr(rule, "ge") or hasattr(rule, "gt") for rule in field.metadata), name


def test_home_is_expanded_and_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().home == tmp_path / ".manyhats"
    monkeypatch.chdir(tmp_path)
    assert Settings(home=Path("here")).home == tmp_path / "here"


def test_lists_in_the_environment(monkeypatch):
    monkeypatch.setenv("MANYHATS_ADAPTER_ROOT", "/a,1:/b:")
    monkeypatch.setenv("MANYHATS_API_KEYS", "one,two")
    settings = Settings()
    assert settings.adapter_root == (Path("/a,1"), Path("/b"))
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_keys_are_not_shown():
    settings = Settings(
        admin_api_keys=(SecretStr("hush-admin"),), api_keys=(SecretStr("hush-user"),)
    )
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hush" not in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slots", 0),
        ("slots", 4097),
        ("max_rank", 1025),
        ("port", -1),
        ("threads", 0),
        ("max_context", 15),
        ("block_size", 257),
        ("drain_s", -0.1),
        ("quantization", "nf5"),
        ("device", "tpu"),
        ("no_such_setting", 1),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(name, value):
    with pytest.raises(ValidationError) as caught:
        Settings(**{name: value})
    assert [item["loc"] for item in caught.value.errors()] == [(name,)]


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().slots = 3


def test_rows_follow_slots_and_rank():
    assert Settings(slots=32, max_rank=64).rows == 512
    assert Settings(slots=1, max_rank=64).rows == 64
    assert Settings(slots=32, pool_rows=100, max_rank=64).rows == 100


def test_unknown_variables_are_found(monkeypatch):
    monkeypatch.setenv("MANYHATS_SLOT", "4")
    monkeypatch.setenv("MANYHATS_SLOTS", "4")
    assert unknown_variables() == ["MANYHATS_SLOT"]


def test_secrets_come_from_files_beside_those_given(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("two\n\n  three \n")
    (tmp_path / "url").write_text("redis://elsewhere/0\n")
    monkeypatch.setenv("MANYHATS_ADMIN_API_KEYS", "one")
    monkeypatch.setenv("MANYHATS_ADMIN_API_KEYS_FILE", str(tmp_path / "keys"))
    settings = Settings(redis_url_file=tmp_path / "url", api_keys_file=tmp_path / "keys")
    assert [k.get_secret_value() for k in settings.admin_api_keys] == ["one", "two", "three"]
    assert [k.get_secret_value() for k in settings.api_keys] == ["two", "three"]
    assert settings.redis_url.get_secret_value() == "redis://elsewhere/0"


@pytest.mark.parametrize("text", [None, "", " \n", "redis://a\nredis://b\n"])
def test_a_bad_file_of_secrets_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "url"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValidationError, match="redis_url_file: ") as caught:
        Settings(redis_url_file=file)
    assert all("redis://" not in error["msg"] for error in caught.value.errors())
