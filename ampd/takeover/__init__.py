"""Taking over a database that a person, or another tool, has migrated: what is recorded as applied, and the proof."""
