"""The command lines and files of other systems, each translated into sections in a room of its own."""
