"""ampd against a real PostgreSQL."""
