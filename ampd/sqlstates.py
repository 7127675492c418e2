"""SQLSTATEs, by their names in PostgreSQL's appendix of error codes; those of the class AM are ampd's own. Pure."""

from __future__ import annotations

# What ampd's own blocks raise; nobody else uses this class.
BUSY = "AM001"  # another runner holds the lock
MOVED = "AM002"  # the history is not what the plan was made from
ESCAPED = "AM003"  # the migration ended the transaction that it ran in
REPLACED = "AM004"  # the name of the history has come to mean another table, or none
ALTERED = "AM005"  # the history is not as ampd has made it: another owner, a trigger …
EMPTIED = "AM006"  # rows that were in the history are not there any more
EXPOSED = "AM007"  # the schema of the history belongs to somebody who is not trusted
NEIGHBOURS = "AM008"  # something else is in the database that a first run has to look at
READ = "AM009"  # a history has been read: ends the block that has locked it

FEATURE_NOT_SUPPORTED = "0A000"
CHARACTER_NOT_IN_REPERTOIRE = "22021"
INVALID_TEXT_REPRESENTATION = "22P02"
UNTRANSLATABLE_CHARACTER = "22P05"
UNIQUE_VIOLATION = "23505"
ACTIVE_SQL_TRANSACTION = "25001"
READ_ONLY_SQL_TRANSACTION = "25006"
NO_ACTIVE_SQL_TRANSACTION = "25P01"
IDLE_IN_TRANSACTION_SESSION_TIMEOUT = "25P03"
TRANSACTION_TIMEOUT = "25P04"
INVALID_SQL_STATEMENT_NAME = "26000"
INVALID_TRANSACTION_TERMINATION = "2D000"
INVALID_SAVEPOINT_SPECIFICATION = "3B001"
INVALID_CATALOG_NAME = "3D000"
INVALID_SCHEMA_NAME = "3F000"
SERIALIZATION_FAILURE = "40001"
DEADLOCK_DETECTED = "40P01"
INSUFFICIENT_PRIVILEGE = "42501"
UNDEFINED_COLUMN = "42703"
UNDEFINED_OBJECT = "42704"
WRONG_OBJECT_TYPE = "42809"
UNDEFINED_FUNCTION = "42883"
UNDEFINED_TABLE = "42P01"
DUPLICATE_SCHEMA = "42P06"
DUPLICATE_TABLE = "42P07"
DISK_FULL = "53100"
TOO_MANY_CONNECTIONS = "53300"
LOCK_NOT_AVAILABLE = "55P03"
UNSAFE_NEW_ENUM_VALUE_USAGE = "55P04"
QUERY_CANCELED = "57014"
INTERNAL_ERROR = "XX000"

# Classes: the first two characters.
CONNECTION_EXCEPTION = "08"
DATA_EXCEPTION = "22"
SYNTAX_ERROR = "42"  # or access rule violation
INSUFFICIENT_RESOURCES = "53"
OPERATOR_INTERVENTION = "57"
SYSTEM_ERROR = "58"
INTERNAL = "XX"
