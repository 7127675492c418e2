"""SQL scripts: where statements begin and end, what kind each one is, and what cannot work.

Pure; imports nothing else of ampd.
"""
