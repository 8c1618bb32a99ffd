"""The version, in the one place that pyproject.toml, the package and the command line read."""

__version__ = "0.1.0"
