"""The feature store at scale: shards, each with a memory-mapped index, and a manifest of them.

    STORE/recipe.json                  what the features were made with (mm/data/recipe.py)
    STORE/shards/00000037/body.bin     blobs: one safetensors content for each sample and each caption (blobs.py)
    STORE/shards/00000037/index.bin    where each blob is, its checksum, shapes, names; the order by shape (shard.py)
    STORE/shards/00000037/listing.jsonl  one row a sample, for people and tools
    STORE/catalog-<digest>.bin         of all shards: counts, checksums, how many of each shape they hold (catalog.py)
    STORE/manifest.json                names the catalog; written last: where it is, the store is complete

A shard is the unit of work, of commit (one rename) and of repair. Opening a store reads the manifest and maps the
catalog; a shard's index is mapped and checked when a sample of it is asked for. There is no object for each sample.
"""
