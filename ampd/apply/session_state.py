"""What a script may leave behind in its session: saved before it, put back after it, in SQL."""

from __future__ import annotations

from ampd.postgres.quoting import do_block, identifier
from ampd.sqlstates import ESCAPED

LEASE_SECS = 20  # a client that is silent for so long in a transaction that waits for it is lost

# A server that loses its client in the middle of a statement finishes it first, locks held, unless told to check.
_KEEPALIVES = {"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3"}
_SET_KEEPALIVES = ", ".join(f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in _KEEPALIVES.items())
NOTICE_A_DEAD_CLIENT = f"""
  BEGIN
    PERFORM pg_catalog.set_config('client_connection_check_interval', '1s', true);
  EXCEPTION WHEN OTHERS THEN NULL;  -- before PostgreSQL 14, and on Windows
  END;
  PERFORM {_SET_KEEPALIVES};"""

NO_TRANSACTION_TIMEOUT = """
  IF pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL THEN  -- since PostgreSQL 17
    PERFORM pg_catalog.set_config('transaction_timeout', '0', true);
  END IF;"""


def with_settings_sql(body: str) -> str:
    """Return PL/pgSQL that runs `body` with a variable `settings`: SQL expressions, by commas, that set all of these.

    So what this server knows of them is found out once in a message, and each transaction then only evaluates it.
    """
    return f"""
  DECLARE
    settings pg_catalog.text := $set${_SET_KEEPALIVES}$set$;
  BEGIN
    BEGIN
      PERFORM pg_catalog.set_config('client_connection_check_interval', '1s', true);
      settings := pg_catalog.concat(settings,
        $set$, pg_catalog.set_config('client_connection_check_interval', '1s', true)$set$);
    EXCEPTION WHEN OTHERS THEN NULL;  -- before PostgreSQL 14, and on Windows
    END;
    IF pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL THEN  -- since PostgreSQL 17
      settings := pg_catalog.concat(settings, $set$, pg_catalog.set_config('transaction_timeout', '0', true)$set$);
    END IF;{body}
  END;"""


# A block cannot set its own limit: the one that held when it began is the script's.
NO_STATEMENT_TIMEOUT = "SET LOCAL statement_timeout = 0; "

# Deferred constraints and triggers are a part of the script: they see the session as the script has left it.
RUN_DEFERRED = "SET CONSTRAINTS ALL IMMEDIATE; "


def deallocate_sql(prefix: str = "") -> str:
    """Return a PL/pgSQL block that drops the statements that a script has prepared; those of a `prefix` stay.

    Not DEALLOCATE ALL: the driver of a connection of the caller's pool has prepared statements of its own.
    """
    others = f" AND NOT pg_catalog.starts_with(name, '{prefix}')" if prefix else ""
    return f"""
DECLARE
  made pg_catalog.text;
BEGIN
  FOR made IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql{others} LOOP
    EXECUTE pg_catalog.format('DEALLOCATE %I', made);
  END LOOP;
END"""


RESET_OBJECTS = "CLOSE ALL; UNLISTEN *; DISCARD TEMP; DISCARD SEQUENCES; "

# What a rollback does not take back.
BEYOND_ROLLBACK = f"SELECT pg_catalog.pg_advisory_unlock_all(); {do_block(deallocate_sql())}; "

# What others had set in a session before us is saved as JSON in two places: in a prepared statement, which a script's
# RESET ALL leaves alone, and in this setting, which its DEALLOCATE ALL leaves alone.
_SAVED_IN = "ampd.found"

# A transaction's own modes cannot be reset, and end with it.
_SET = """pg_catalog.pg_settings
    WHERE source OPERATOR(pg_catalog.=) 'session'
      AND name OPERATOR(pg_catalog.<>) ALL ('{transaction_isolation, transaction_read_only, transaction_deferrable}')"""


def _read_saved_sql(saved_as: str) -> str:
    """Return PL/pgSQL that puts what was saved into `kept`, which is null if nothing was."""
    return f"""
  IF EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE name OPERATOR(pg_catalog.=) '{saved_as}') THEN
    EXECUTE 'EXECUTE {saved_as}' INTO kept;
  ELSIF COALESCE(pg_catalog.current_setting('{_SAVED_IN}', true), '') OPERATOR(pg_catalog.<>) '' THEN
    kept := pg_catalog.current_setting('{_SAVED_IN}');
  END IF;"""


def save_settings_sql(saved_as: str, *, local: bool) -> str:
    """Return PL/pgSQL that saves what those who share the session have set, unless it is saved already.

    That is session user, role and settings; `saved_as` is the name of the prepared statement that holds them.
    """
    return f"""
DECLARE
  kept pg_catalog.jsonb;
BEGIN{_read_saved_sql(saved_as)}
  IF kept IS NULL THEN
    SELECT pg_catalog.jsonb_build_object('user', SESSION_USER, 'role', pg_catalog.current_setting('role'),
      'settings', COALESCE(pg_catalog.jsonb_object_agg(name, setting), '{{}}')) INTO kept
    FROM {_SET} AND name OPERATOR(pg_catalog.<>) '{_SAVED_IN}';
    EXECUTE pg_catalog.format('PREPARE {saved_as} AS SELECT %L::pg_catalog.jsonb', kept);
  END IF;
  PERFORM pg_catalog.set_config('{_SAVED_IN}', kept::pg_catalog.text, {_bool(local)});
END;"""


def forget_settings_sql(saved_as: str) -> str:
    """Return PL/pgSQL that drops the prepared statement of `save_settings_sql`, if a script has left it."""
    return f"""
  IF EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE name OPERATOR(pg_catalog.=) '{saved_as}') THEN
    EXECUTE 'DEALLOCATE {saved_as}';
  END IF;"""


def _with_saved_sql(saved_as: str, body: str, *, unless: str = "") -> str:
    """Return a block that runs `body` with the saved settings in `kept`; `unless`, if there are none."""
    return f"""
DECLARE
  kept pg_catalog.jsonb;
  one pg_catalog.record;
BEGIN{_read_saved_sql(saved_as)}
  IF kept IS NULL THEN{unless}
    RETURN;
  END IF;{body}
END"""


def _restore_role_sql(*, local: bool) -> str:
    """Return PL/pgSQL that sets session user and role as they were, in a session that has those of the login."""
    return f"""
  IF kept OPERATOR(pg_catalog.->>) 'user' OPERATOR(pg_catalog.<>) SESSION_USER::pg_catalog.text THEN
    PERFORM pg_catalog.set_config('session_authorization', kept OPERATOR(pg_catalog.->>) 'user', {_bool(local)});
  END IF;
  IF kept OPERATOR(pg_catalog.->>) 'role' OPERATOR(pg_catalog.<>) 'none' THEN
    PERFORM pg_catalog.set_config('role', kept OPERATOR(pg_catalog.->>) 'role', {_bool(local)});
  END IF;"""


def _restore_settings_sql() -> str:
    return f"""
  FOR one IN
    SELECT name, kept OPERATOR(pg_catalog.->) 'settings' OPERATOR(pg_catalog.->>) name AS before
    FROM {_SET} OR kept OPERATOR(pg_catalog.->) 'settings' OPERATOR(pg_catalog.?) name
  LOOP
    IF one.before IS NULL THEN
      EXECUTE (SELECT pg_catalog.concat('RESET ', pg_catalog.string_agg(pg_catalog.quote_ident(part), '.'))
               FROM pg_catalog.unnest(pg_catalog.string_to_array(one.name, '.')) part);
    ELSE  -- also where it is the same: that may hold for the transaction alone
      PERFORM pg_catalog.set_config(one.name, one.before, false);
    END IF;
  END LOOP;{_restore_role_sql(local=False)}
  PERFORM pg_catalog.set_config('{_SAVED_IN}', '', false);"""


def _bool(value: bool) -> str:
    return str(value).lower()


_GONE = f"""
    RAISE EXCEPTION 'what others had set on the connection is lost: the migration ran RESET ALL and DEALLOCATE ALL'
      USING ERRCODE = '{ESCAPED}';"""


def reset_settings_sql(saved_as: str, *, required: bool = False, keep: bool = False) -> str:
    """Return the statements that take back role and settings: to the defaults, or to what others had set.

    `saved_as` is the name of `save_settings_sql`, or empty if nobody else uses the session. If it is `required` that
    something is saved, it fails where nothing is; with `keep` that stays, for the next transaction of the message.
    """
    if not saved_as:
        return f"{NO_STATEMENT_TIMEOUT}SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; "
    login = "\n  SET SESSION AUTHORIZATION DEFAULT;\n  RESET ROLE;"
    forget = "" if keep else forget_settings_sql(saved_as)
    block = _with_saved_sql(saved_as, f"{login}{_restore_settings_sql()}{forget}", unless=_GONE if required else "")
    return f"{NO_STATEMENT_TIMEOUT}{do_block(block)}; "


def set_role_sql(role: str | None, *, local: bool) -> str:
    """Return the statement that sets the configured role, for a transaction or for the session."""
    return "" if role is None else f"SET {'LOCAL ' if local else ''}ROLE {identifier(role)}; "


def own_role_sql(role: str | None, saved_as: str) -> str:
    """Return the statements by which the rest of a transaction has our own role, whatever its script has set.

    `saved_as` is as for `reset_settings_sql`; as long as nothing is saved, no script has set anything.
    """
    login = "SET LOCAL SESSION AUTHORIZATION DEFAULT; SET LOCAL ROLE TO DEFAULT; "
    if saved_as:
        login = f"{do_block(_with_saved_sql(saved_as, f'{login}{_restore_role_sql(local=True)}'))}; "
    return f"{login}{set_role_sql(role, local=True)}"


def reset_session_sql(saved_as: str, *, required: bool) -> str:
    """Return the statements that take back what a script may have changed in the session."""
    return f"{reset_settings_sql(saved_as, required=required)}{RESET_OBJECTS}{BEYOND_ROLLBACK}"
