"""Generation: prompts to video files with a trained transformer."""
