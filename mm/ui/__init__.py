"""A local page on which people generate clips and look at them."""
