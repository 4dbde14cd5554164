"""Pages that show what a model will be trained on."""
