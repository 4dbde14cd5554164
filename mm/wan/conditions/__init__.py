"""Conditions of the Wan family: pixels, masks, images and camera paths to what the models are shown of them."""
