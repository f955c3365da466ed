"""What a type checker makes of an application that uses the package."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

APPLICATION = Path(__file__).with_name("typed_app.py")
STRICT = ["--strict", "--warn-unreachable", "--config-file=", "--no-error-summary"]
# Not the project's own: its settings differ, and one would keep invalidating the other.
CACHE = Path(__file__).parent.parent / ".mypy_cache" / "typed_app"


def checked(*files: str) -> str:
    """What mypy says about files when it is as strict as can be and knows no settings of this project."""
    said, complaints, _ = api.run([*STRICT, f"--cache-dir={CACHE}", *files])
    return str(said + complaints)


@pytest.mark.slow
def test_the_sample_application_passes_the_strictest_check():
    assert checked(str(APPLICATION)) == ""


@pytest.mark.slow
def test_the_check_would_notice_a_wrong_type(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        APPLICATION.read_text().replace("assert_type(Inject(Chat), Chat)", "assert_type(Inject(Chat), History)")
    )
    said = checked(str(wrong))
    assert 'Expression is of type "Chat", not "History"  [assert-type]' in said
    assert said.count("error:") == 1
