import pytest

from {{ cookiecutter.__module }}.settings import Settings


def test_an_empty_environment_will_do() -> None:
    assert Settings.read({}).concurrency == 32


def test_a_variable_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="{{ cookiecutter.__prefix }}_CONCURRENCY='many'"):
        Settings.read({"{{ cookiecutter.__prefix }}_CONCURRENCY": "many"})
