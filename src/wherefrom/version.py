"""The library's version: written here alone, so that a source tree that is not installed knows it too."""

VERSION = "0.2.0"
