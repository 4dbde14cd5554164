"""MindSpeed-MM's and Megatron's flags, JSONs and YAML: what its scripts say, as sections."""
