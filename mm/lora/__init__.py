"""LoRA: which linears get an adapter, the layer, adapter files of several tools, merging into weights."""
