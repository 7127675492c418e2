"""The history table: what the database remembers, whether it can be believed, and how it is written."""
