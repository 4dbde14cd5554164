"""Data: annotations, videos, the feature store, the order of samples, batches."""
