"""Options of `astra-serve`."""

import pytest

from astra_serve import start


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("8MiB", 8 * 2**20), ("64KiB", 2**16), ("1GiB", 2**30)])
def test_a_size_is_given_in_bytes_or_with_its_unit(text: str, size: int) -> None:
    args, _ = start._parser().parse_known_args(["--base", "x", "--max-body", text])
    assert args.max_body == size


@pytest.mark.parametrize("text", ["0", "-1", "8MB", "8 MiB", "1.5MiB", "much", ""])
def test_another_size_is_one_line_with_an_example(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start._parser().parse_args(["--base", "x", f"--max-body={text}"])
    assert "a size such as 8MiB" in capsys.readouterr().err
