"""The package's public names."""

import subprocess
import sys

import pytest

import lowbit


def test_every_public_name_is_there():
    assert set(lowbit.__all__) == {*lowbit._MODULE_OF, *lowbit._MODULES, "__version__"}
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
        assert name in dir(lowbit)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'lowbit' has no attribute 'quantise'"):
        lowbit.quantise  # noqa: B018


def test_importing_a_module_first_hides_no_function():
    """No module of the package bears a public function's name, or importing it would hide that."""
    code = (
        "import lowbit.quantization, lowbit.preparation, lowbit.checkpoint, lowbit.codebooks\n"
        "assert all(callable(getattr(lowbit, n)) for n in ('quantize', 'prepare', 'load', 'pack'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
