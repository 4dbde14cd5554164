"""Rules that look at more than one value of the sections. Each is one function with its id, and says which values
would work in the user's own words; all run, all problems are shown."""
