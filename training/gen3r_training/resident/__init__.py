"""Training with all data in the device's memory: for models of a few million parameters.

A small model's step takes milliseconds, in which no loader reads and encodes a batch. Here clips
(`gen3r_training.procedural`) are loaded once and batches are gathered, augmented and computed on
the device, in whole batches. Five objectives train the chain from nothing: the appearance VAE,
VGGT, text and image encoder, the geometry adapter, the diffusion transformer. The mathematics of
the last two is that of the full-size stages (`gen3r_training.adapter`, `.diffusion`).
"""
