"""Optimizers on a parallel model: gradients made whole, the update, averages, and what each rank owns."""
