"""What a command of the package says where its user has made a mistake."""

import contextlib
import io

import pytest


def error_of(main, *arguments):
    """The message of a command that fails on these arguments, without the line's end."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    # A mistake on the command line itself is what it exits with.
    message = stopped.value.code if isinstance(stopped.value.code, str) else told.getvalue().removesuffix("\n")
    assert stopped.value.code not in (0, None) and message.startswith("error: "), message
    return message
