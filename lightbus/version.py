"""The version of Lightbus. The build reads it from this file; it needs no installed distribution."""

__version__ = "0.1.0"
