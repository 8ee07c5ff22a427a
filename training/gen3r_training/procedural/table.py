"""The fixed-size table that describes a scene's surfaces, one row a primitive.

Scenes of one shape render in one batch: unused rows have half-extents of -1 and are never hit.
World axes: x right, y DOWN, z along the room; the floor is y = 0; lengths in metres.

Rows: the six faces of the room (x-, x+, ceiling, floor, z-, z+), rectangles painted on them
("decals"), boxes turned about the vertical, spheres, upright cylinders, arches.
"""

from __future__ import annotations

FACES, DECALS, BOXES, SPHERES, CYLINDERS, ARCHES = 6, 4, 8, 4, 6, 1
FIRST_DECAL = FACES
FIRST_BOX = FIRST_DECAL + DECALS
FIRST_SPHERE = FIRST_BOX + BOXES
FIRST_CYLINDER = FIRST_SPHERE + SPHERES
FIRST_ARCH = FIRST_CYLINDER + CYLINDERS
ROWS = FIRST_ARCH + ARCHES
FIRST = {
    "decal": (FIRST_DECAL, DECALS),
    "box": (FIRST_BOX, BOXES),
    "sphere": (FIRST_SPHERE, SPHERES),
    "cylinder": (FIRST_CYLINDER, CYLINDERS),
    "arch": (FIRST_ARCH, ARCHES),
}
LEFT, RIGHT, CEILING, FLOOR, BACK, FRONT = range(FACES)

# Columns. An arch is a box with an upright hole through z: HOLE radius, its round top begins at
# the height SPRING (a world y). A plane's outward side is its NORMAL (the same three columns).
CENTER, HALF, COSINE, SINE, NORMAL, KIND = 0, 3, 6, 7, 8, 11
HOLE, SPRING = NORMAL, NORMAL + 1
COLOR, SECOND, TEXTURE, PERIOD, PHASE, STRENGTH = 12, 15, 18, 19, 20, 21
COLUMNS = 22
PLANE, BOX, SPHERE, CYLINDER, ARCH = range(5)

# Lights: position of the lamp or direction to the sun, radius (of the lamp in metres, of the sun in
# radians), 1 for a sun, its colour, the light from above and the light from below.
LIGHT, RADIUS, SUN, INTENSITY, ABOVE, BELOW = 0, 3, 4, 5, 8, 11
LIGHT_COLUMNS = 14
TEXTURES = ("plain", "brick", "plank", "tile", "checkered", "striped", "marble", "panel")
