"""One module for each weight format: what its folders look like, how they are read and written."""
