"""Locate the PyTorch whose headers the compiled libraries are built against.

Run as a script (CMakeLists.txt does) it prints three lines: the torch directory, its version, its
CUDA version ("none" for a CPU build). Torch is not imported: that takes seconds and fails where a
driver is missing.

`pip install .` builds in an isolated environment which holds only what pyproject.toml asks for. Its
interpreter is still the one of the target environment, so the torch that is installed there, the
one lowbit will run with, is found through sysconfig. That saves a second download of torch, which
is several GB for a CUDA build.
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 10)


def torch_directory() -> Path | None:
    """Return the directory of the torch package, or None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        directory = Path(sysconfig.get_paths()[scheme]) / "torch"
        if (directory / "version.py").is_file():
            return directory
    return None


def torch_versions(directory: Path) -> tuple[str, str]:
    """Return (version, CUDA version or "none"), read from torch/version.py without running it."""
    text = (directory / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
    return version.group(1) if version else "0", cuda.group(1) if cuda else "none"


def is_recent(version: str) -> bool:
    """Whether the version offers the stable ABI that lowbit is compiled against."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= MINIMUM


def main() -> int:
    directory = torch_directory()
    if directory is None:
        print(
            f"no torch in {sys.executable}'s environment; pip install torch first", file=sys.stderr
        )
        return 1
    version, cuda = torch_versions(directory)
    if not is_recent(version):
        print(f"torch must be 2.10 or newer, found {version} in {directory}", file=sys.stderr)
        return 1
    print(directory, version, cuda, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
