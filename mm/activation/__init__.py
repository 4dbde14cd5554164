"""Memory of activations: recomputation, and offload to host memory."""
