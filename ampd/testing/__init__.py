"""Tests of a service: a database for each in milliseconds, and migrations that lock nothing in use."""
