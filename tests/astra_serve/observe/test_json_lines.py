"""Every line of a process and its children as JSON."""

import json
import subprocess
import sys

import pytest

from astra_serve.observe.json_lines import json_lines

SCRIPT = """
import os, subprocess, sys
from astra_serve.observe.json_lines import JsonLines
lines = JsonLines()
lines.start()
print('{"name": "mine"}', file=sys.stderr, flush=True)
os.write(2, b"a warning of a C++ library\\n\\nprogress 1\\rprogress 2\\n")
subprocess.run([sys.executable, "-c", "import sys; print('a child'); print('{half', file=sys.stderr)"])
sys.stderr.write("without a line end")
left = subprocess.Popen(["sleep", "60"])  # keeps the pipes open
lines.close()
left.kill()
print("afterwards", file=sys.stderr)
"""


def test_lines_of_libraries_and_children_become_json_and_the_last_ones_are_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    *lines, last = done.stderr.splitlines()
    assert last == "afterwards"
    records = [json.loads(line) for line in lines]
    assert records[0] == {"name": "mine"}
    expected = ["a warning of a C++ library", "progress 1", "progress 2", "{half", "without a line end"]
    assert [record["message"] for record in records[1:]] == expected
    assert records[1]["levelname"] == "WARNING"
    assert {"asctime", "levelname", "name", "message"} == set(records[1])
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == ["a child"]


@pytest.mark.parametrize("line", ["{}", '{"a": 1}'])
def test_a_line_of_json_stays_as_it_is(line: str) -> None:
    assert json_lines(line + "\n", "stderr") == [line]


@pytest.mark.parametrize("line", ["\n", "  \n", "\r\n"])
def test_an_empty_line_is_dropped(line: str) -> None:
    assert json_lines(line, "stderr") == []
