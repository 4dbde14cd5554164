"""Flow matching (the training objective) and the samplers that integrate the learned velocity."""
