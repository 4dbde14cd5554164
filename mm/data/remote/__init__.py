"""Object storage as a place of feature stores, read through fsspec and a bounded cache on the local disk.

client.py   clients, what their errors mean, trying again
cache.py    the folder that keeps what was read
reading.py  reads of places, local and remote alike
writing.py  the same for writes
"""
