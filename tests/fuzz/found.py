"""What the tests of found cases share."""

import json
import os

import pytest

DEEP = "[" * 100_000
MANY_DIGITS = "9" * 5000


def made(make, folder):
    folder.mkdir()
    make(folder)
    return folder


def pipe(path):
    os.mkfifo(path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_mistake_of_any_length(error, call, *named):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).isprintable()
    assert all(str(part) in str(caught.value) for part in named)
