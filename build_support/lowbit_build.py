"""The PEP 517 backend: setuptools, plus torch in the list of what the build environment needs.

torch is left out where the target environment has it already (find_torch.py explains how the build
then sees it). An isolated build on a machine without torch downloads the newest one, on Linux a
CUDA build of several GB; install torch first, or build with --no-build-isolation, to choose.
"""

from find_torch import is_recent, torch_directory, torch_versions
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a backend is its module's names)


def torch_requirement() -> list[str]:
    directory = torch_directory()
    if directory is not None and is_recent(torch_versions(directory)[0]):
        return []
    return ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()
