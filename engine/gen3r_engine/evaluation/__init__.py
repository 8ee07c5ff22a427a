"""How good a scene is: errors against true images, depth, points and cameras, and the suites."""
