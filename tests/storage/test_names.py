"""What may become a part of a path."""

import pytest

from sapt_jax.storage.names import check_name


@pytest.mark.parametrize(
    "name", ["sst2", "task1572_samsum_summary", "[lr=0.01] x*?", "中文", "a b", "...x", "é" * 100, "-"]
)
def test_a_plain_name_is_returned(name):
    assert check_name(name, "here") == name


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../x", "a slash"), ("/etc/passwd", "a slash"), ("glue/sst2", "a slash"), ("a\\b", "a slash"),
        ("", "no file"), (".", "no file"), ("..", "no file"), (" . ", "no file"),
        ("a\0b", "control"), ("a\nb", "control"),
        ("a\u2028", "control"), ("\ud83d", "control"), ("x" * 201, "200 bytes"), ("é" * 101, "200 bytes"),
        (None, "a NoneType, not text"), (3, "a int, not text"), (["a"], "a list, not text"),
    ],
)  # fmt: skip
def test_what_leads_elsewhere_is_refused(name, fault):
    with pytest.raises(ValueError) as error:
        check_name(name, "file.json: tasks")
    message = str(error.value)
    assert message.startswith("file.json: tasks: ") and fault in message
    assert len(message) < 250 and message.isprintable()
