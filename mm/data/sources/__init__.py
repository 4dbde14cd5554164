"""Sources of samples: tables of metadata in the dialects of several systems, as rows of one kind."""
