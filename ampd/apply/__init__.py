"""Applying one migration, in one transaction or statement by statement."""
