"""Scenes in the formats of other programs, one file a format: glTF, COLMAP, nerfstudio, depth PNG.

All of them take what a `gen3r.scene.Scene` holds (OpenCV cameras, world to camera, pixel indices
without the half-pixel offset) and convert to their own conventions; `cameras` is what they share.
"""
