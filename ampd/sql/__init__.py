"""SQL scripts: where statements begin and end, what kind each one is, and what cannot work.

Pure, and imports nothing of ampd's but itself.
"""
