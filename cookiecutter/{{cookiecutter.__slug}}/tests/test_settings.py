import attrs
import pytest

from {{ cookiecutter.__module }}.settings import Settings

SECRETS = ("password", "secret", "token", "key", "url", "dsn")


def test_each_setting_has_a_default() -> None:
    assert Settings.read({}).concurrency == 32


def test_an_error_names_the_variable() -> None:
    with pytest.raises(ValueError, match="{{ cookiecutter.__prefix }}_CONCURRENCY='many'"):
        Settings.read({"{{ cookiecutter.__prefix }}_CONCURRENCY": "many"})


def test_logs_show_no_secrets() -> None:
    shown = [field.name for field in attrs.fields(Settings) if field.repr]
    assert not [name for name in shown if any(word in name for word in SECRETS)], "use attrs.field(repr=False)"
