"""What the docstrings of the public API say of arguments and options is what the code has."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asena_tornado
from asena_tornado import WebSocketOptions

ENTRY = re.compile(r"^ {4}\*{0,2}(\w+)(?: \((.*?)\))?: ", re.MULTILINE)
UNITS = {"KiB": 1024, "MiB": 1024 * 1024}
WORDS = {"none": None, "off": False, "on": True}


def section(text: str, name: str) -> dict[str, str] | None:
    """The entries of a section of a docstring, each with what its brackets say; None if there is no such section."""
    found = re.search(rf"^{name}:\n((?: {{4}}.*\n?|\n)*)", inspect.cleandoc(text), re.MULTILINE)
    return None if found is None else dict(ENTRY.findall(found[1]))


def public() -> Iterator[Any]:
    """Every public object, and the public methods and properties of every public class."""
    for name in asena_tornado.__all__:
        value = getattr(asena_tornado, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue  # a type alias, the version
        yield pytest.param(value, id=name)
        for own, member in vars(value).items() if inspect.isclass(value) else ():
            member = getattr(member, "__wrapped__", getattr(member, "fget", member))
            if inspect.isfunction(member) and ((own == "__init__" and member.__doc__) or not own.startswith("_")):
                yield pytest.param(member, id=f"{name}.{own}")


@pytest.mark.parametrize("documented", list(public()))
def test_a_docstring_says_what_it_is_about_and_lists_all_arguments_or_none(documented: Any):
    text = documented.__doc__
    assert text, "it has no docstring"
    summary, *rest = text.split("\n")
    assert summary.rstrip()[-1] in ".:", "the first line is a sentence"
    assert not rest or not rest[0].strip(), "the first line is one line"
    told = section(text, "Args")
    if told is not None:
        parameters = inspect.signature(documented).parameters
        assert list(told) == [name for name in parameters if name != "self"]


def test_every_option_is_listed_with_its_default():
    told = section(WebSocketOptions.__doc__ or "", "Attributes")
    assert told is not None
    assert list(told) == list(WebSocketOptions.model_fields)
    for name, field in WebSocketOptions.model_fields.items():
        unit, _, text = told[name].rpartition("default ")
        number, _, factor = text.partition(" ")
        default = WORDS[text] if text in WORDS else text.strip('"') if '"' in text else float(number.replace(",", ""))
        if factor:
            assert isinstance(default, float)
            default *= UNITS[factor]
        assert default == field.default, name
        assert ("seconds" in unit) == name.endswith(("_timeout", "_interval", "_grace")), name


def test_the_readme_sends_people_to_the_options():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert "help(WebSocketOptions)" in readme
