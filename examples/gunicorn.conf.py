"""Gunicorn: the application is loaded once, before the fork; each worker migrates in its lifespan, after it."""

preload_app = True
workers = 4
worker_class = "uvicorn_worker.UvicornWorker"
