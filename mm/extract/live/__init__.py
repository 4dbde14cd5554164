"""Features that are made while training goes on, and kept in the store of their extraction.

A live store offers what an opened store does: ids, shapes and draws of all samples, from an index of the plan's rows
that is made once (index.py). A sample's place (store.py) is where its features are kept (kept.py), or the clip that
they are made of; that is read by training's readers, and encoded by the process that has the encoders, as extraction
encodes it. Features are kept in parts (parts.py): shards in STORE/former, whose samples an extraction copies.
"""
