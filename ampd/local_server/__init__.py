"""A PostgreSQL server of one's own, for `ampd solo` and for tests."""
