"""DiffSynth-Studio's command lines: the arguments of its train.py for Wan."""
