"""The release, written down: asking the installed package's metadata would cost a third of a start."""

VERSION = "0.1.0"
