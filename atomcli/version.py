"""The version of atom: stated once, read by the build, the checkpoint and `atom --version`."""

__version__ = "0.1.0"
