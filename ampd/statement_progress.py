"""How far the server is in a long statement, as its pg_stat_progress_* views show it. Pure."""

from __future__ import annotations

import msgspec

from .display import one_line


class StatementProgress(msgspec.Struct, frozen=True):
    """The phase of an index build, VACUUM, CLUSTER, ANALYZE or COPY, in the server's words; and how much of it is done.

    `percent` is None where the server does not count, as when it sorts or waits.
    """

    phase: str
    percent: int | None = None

    def __str__(self) -> str:
        return one_line(self.phase) + ("" if self.percent is None else f" {self.percent} %")


def progress_sql(pid: str, target: str) -> str:
    """Return PL/pgSQL that sets a variable of type jsonb to the progress of a backend, as `StatementProgress`, or NULL.

    `pid` is an expression. The server hides the progress of roles that the current one is not a member of. The search
    path must be pinned.
    """
    found = "jsonb_build_object('phase', phase, 'percent', CASE WHEN total > 0 THEN least(100 * done / total, 100) END)"
    return f"""
  {target} := (SELECT {found} FROM (
    SELECT pid, phase, CASE WHEN tuples_total > 0 THEN tuples_done ELSE blocks_done END AS done,
      CASE WHEN phase ~ 'waiting|sorting' THEN 0 WHEN tuples_total > 0 THEN tuples_total ELSE blocks_total END AS total
    FROM pg_stat_progress_create_index
    UNION ALL SELECT pid, concat('VACUUM: ', phase),
      CASE phase WHEN 'vacuuming heap' THEN heap_blks_vacuumed ELSE heap_blks_scanned END,
      CASE WHEN phase IN ('scanning heap', 'vacuuming heap') THEN heap_blks_total END
    FROM pg_stat_progress_vacuum WHERE phase IS NOT NULL
    UNION ALL SELECT pid, concat(command, ': ', phase), heap_blks_scanned,
      CASE phase WHEN 'seq scanning heap' THEN heap_blks_total END
    FROM pg_stat_progress_cluster WHERE phase IS NOT NULL
    UNION ALL SELECT pid, concat('ANALYZE: ', phase), sample_blks_scanned,
      CASE phase WHEN 'acquiring sample rows' THEN sample_blks_total END
    FROM pg_stat_progress_analyze WHERE phase IS NOT NULL) p WHERE pid = {pid} AND phase IS NOT NULL LIMIT 1);
  IF {target} IS NULL AND current_setting('server_version_num')::integer >= 140000 THEN
    {target} := (SELECT {found} FROM (
      SELECT pid, CASE WHEN bytes_total > 0 THEN command ELSE concat(command, ': ', tuples_processed, ' rows') END
        AS phase, bytes_processed AS done, bytes_total AS total
      FROM pg_stat_progress_copy WHERE command IS NOT NULL) p WHERE pid = {pid} LIMIT 1);
  END IF;"""
