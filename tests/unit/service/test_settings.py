"""Settings: what the environment may say, and what is refused with a name."""

from pathlib import Path

import pytest

from clients.errors import ConfigurationError
from service.settings import load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests takes part."""
    import os

    for name in [name for name in os.environ if name.upper().startswith("PERSYN_")]:
        monkeypatch.delenv(name)


def test_defaults_are_loopback_and_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any variable: loopback, no keys, and a cache file under XDG_CACHE_HOME."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    settings = load_settings()
    assert (settings.host, settings.port, settings.api_keys) == ("127.0.0.1", 8080, ())
    assert settings.redis_url is None
    assert settings.cache_path == Path("/somewhere/persyn/responses.sqlite")


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag overrides a variable; a flag that was not given (None) does not."""
    monkeypatch.setenv("PERSYN_PORT", "9001")
    assert load_settings(port=9002).port == 9002
    assert load_settings(port=None).port == 9001


def test_keys_are_split_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """PERSYN_API_KEYS holds several keys, blanks around them do not count, and no repr shows them."""
    monkeypatch.setenv("PERSYN_API_KEYS", "alpha-secret, beta-secret,")
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["alpha-secret", "beta-secret"]
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PERSYN_API_KEY", "PERSYN_API_KEYS"),
        ("PERSYN_REDISURL", "PERSYN_REDIS_URL"),
        ("persyn_prt", "PERSYN_PORT"),
    ],
)
def test_a_misspelt_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, nearest: str) -> None:
    """A PERSYN_ name that is no setting stops the start; the message names it and the nearest valid one."""
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError, match=rf"{name} is not a setting; did you mean {nearest}\?"):
        load_settings()


def test_names_meant_for_the_project_file_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of a teacher may live under the prefix if the project file names it."""
    monkeypatch.setenv("PERSYN_TEACHER_KEY", "x")
    assert load_settings(known=["PERSYN_TEACHER_KEY"]).port == 8080


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_the_network_needs_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without API keys only loopback is served; with one, any address is."""
    with pytest.raises(ConfigurationError, match="PERSYN_API_KEYS"):
        load_settings(host=host)
    monkeypatch.setenv("PERSYN_API_KEYS", "k")
    assert load_settings(host=host).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    """Every spelling of loopback is served without keys."""
    assert load_settings(host=host).host == host


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PERSYN_PORT", "hunter2-port"),
        ("PERSYN_REDIS_URL", "http://user:hunter2@host"),
        ("PERSYN_API_KEYS", "hunter2 with blanks"),
        ("PERSYN_LOG_FORMAT", "hunter2"),
    ],
)
def test_a_bad_value_is_named_but_not_quoted(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A value that does not fit is refused by the name of its variable; the value may be a secret."""
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    assert name in failure.value.message
    assert "hunter2" not in failure.value.message


def test_a_bad_flag_is_named_as_a_flag() -> None:
    """A value from the command line is refused under the flag's name."""
    with pytest.raises(ConfigurationError, match="--port"):
        load_settings(port=70000)


def test_an_empty_variable_is_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PERSYN_REDIS_URL=` in an env file means the default, not an empty address."""
    monkeypatch.setenv("PERSYN_REDIS_URL", "")
    monkeypatch.setenv("PERSYN_API_KEYS", "")
    settings = load_settings()
    assert (settings.redis_url, settings.api_keys) == (None, ())
