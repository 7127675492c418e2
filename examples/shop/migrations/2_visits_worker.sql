-- no-transaction
CREATE INDEX CONCURRENTLY visits_worker ON visits (worker);
