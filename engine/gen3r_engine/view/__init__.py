"""Looking at a scene in a browser: a page of one file (`static_page`) or a server (`server`).

Both show a `scene_view.SceneView`, made from a `Scene` or from a folder (`scene_folder`).
"""
