"""The version, in the one place where it is written (also read by setuptools and setup.py)."""

__version__ = "0.1.0"
