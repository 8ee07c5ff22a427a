"""A scene in the browser through viser: points, frusta, frames, sliders.

viser is an optional dependency (`pip install 'gen3r-engine[view]'`). Each frame's points are one
node, so that the frame slider only shows and hides; the confidence slider sends points anew.
"""

from __future__ import annotations

import contextlib
import io
import math
import socket
from typing import TYPE_CHECKING, Any

import numpy as np

from gen3r_engine.formats.cameras import FrameCameras
from gen3r_engine.view.scene_view import SceneView
from gen3r_engine.view.static_page import first_look

if TYPE_CHECKING:
    import viser

MODES = ("of all frames", "up to this frame", "of this frame")
_ACCENT, _QUIET = (255, 168, 80), (107, 117, 138)
NEAR_SHARE, FAR_SHARE = 0.005, 60.0  # of the starting distance; as in page.js
_PIXELS = 800.0  # a point of size 1 covers about one pixel of a window this high


def require_viser() -> None:
    """ValueError with the mend when viser is not installed."""
    try:
        import viser  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the viewer needs viser ({error}); pip install 'gen3r-engine[view]', "
            "or write a page that needs nothing with --static"
        ) from error


class SceneServer:
    """A running page that shows one scene.

    Parameters
    ----------
    host : address to listen on; 127.0.0.1 is reached through an ssh tunnel only.
    port : the next free one is taken where it is in use; see `port`.

    Raises
    ------
    ValueError : viser is not installed. OSError : the address cannot be used.
    """

    def __init__(self, view: SceneView, host: str = "127.0.0.1", port: int = 8080) -> None:
        require_viser()
        import viser

        _check_address(host)
        self.view = view
        with contextlib.redirect_stdout(io.StringIO()):  # its banner; the caller says where it is
            self.server = viser.ViserServer(host=host, port=port, label=view.title, verbose=False)
        self.port = int(self.server.get_port())
        self.host = host
        self._drawn_frame = -1
        self._dropped = 0
        self.target, self.distance = first_look(view)
        self.server.scene.set_up_direction("-y")
        self._clouds = self._add_clouds()
        self._frusta = self._add_frusta()
        self._add_controls()
        self._place_camera()
        self._update()

    def stop(self) -> None:
        """Close the page's connections and the port."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.server.stop()

    def _place_camera(self) -> None:
        """Where every new page starts, and what its "reset view" returns to."""
        start = self.server.initial_camera
        start.position = self.distance * np.array([-0.33, -0.27, -0.9]) + self.target
        start.look_at = np.array(self.target)
        start.near, start.far = self.distance * NEAR_SHARE, self.distance * FAR_SHARE

    # ------------------------------------------------------------------------------------ the scene

    def _rows(self, frame: int) -> slice:
        """The points of one frame (of the only node, where the cloud is not divided)."""
        starts = self.view.starts
        if starts is None:
            return slice(0, len(self.view.points))
        return slice(int(starts[frame]), int(starts[frame + 1]))

    def _add_clouds(self) -> list[Any]:
        nodes = 1 if self.view.starts is None else len(self.view.starts) - 1
        return [
            self.server.scene.add_point_cloud(
                f"/points/{node}",
                points=self.view.points[self._rows(node)],
                colors=self.view.colors[self._rows(node)],
                point_size=2.0 * self.distance / _PIXELS,
                point_shape="circle",
                point_shading="flat",
            )
            for node in range(nodes)
        ]

    def _add_frusta(self) -> list[Any]:
        cameras = self.view.cameras
        if cameras is None or self.view.height < 1:
            return []
        return [self._add_frustum(cameras, index) for index in range(len(cameras))]

    def _add_frustum(self, cameras: FrameCameras, index: int) -> Any:
        pose = _quaternion(cameras.rotations[index].T)
        handle = self.server.scene.add_camera_frustum(
            f"/cameras/{int(cameras.frames[index])}",
            fov=2.0 * math.atan2(self.view.height / 2.0, float(cameras.focal[index, 1])),
            aspect=self.view.width / self.view.height,
            color=_QUIET,
            thickness=1.5,
            thickness_units="screen",
            wxyz=pose,
            position=cameras.positions[index],
        )
        # viser keeps a frustum's volume; here its length is what counts.
        handle.scale = self.view.frustum / handle.compute_canonical_frustum_size()[2]
        handle.on_click(lambda _: self._jump(int(cameras.frames[index])))
        return handle

    # --------------------------------------------------------------------------------- the controls

    def _add_controls(self) -> None:
        gui, view = self.server.gui, self.view
        gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False)
        gui.set_panel_label(f"{view.title or 'Scene'} ({len(view.points):,} points)")
        last = view.count - 1
        self.frame: Any = gui.add_slider(
            "Frame", min=0, max=max(1, last), step=1, initial_value=0, visible=last > 0
        )
        by_frame = view.starts is not None and last > 0
        self.mode = gui.add_dropdown("Points", MODES, initial_value=MODES[0], visible=by_frame)
        self.size = gui.add_slider("Point size", min=0.5, max=8.0, step=0.1, initial_value=2.0)
        self.drop = gui.add_slider(
            "Drop the least sure %",
            min=0,
            max=95,
            step=1,
            initial_value=0,
            visible=view.sureness is not None,
        )
        self.cameras = gui.add_checkbox("Cameras", True, visible=bool(self._frusta))
        self.image = gui.add_checkbox(
            "Frame in its camera", True, visible=bool(self._frusta) and view.frames is not None
        )
        through = gui.add_button("Through this frame's camera", visible=bool(self._frusta))
        through.on_click(self._look_through)
        for text in (*view.notes, *(f"No {m}" for m in view.missing)):
            gui.add_markdown(f"*{text}*")
        for control in (self.frame, self.mode, self.size, self.drop, self.cameras, self.image):
            control.on_update(lambda _: self._update())

    def _look_through(self, event: viser.GuiEvent[Any]) -> None:
        cameras, frame = self.view.cameras, int(self.frame.value)
        if cameras is None or event.client is None or frame not in cameras.frames:
            return
        index = int(np.searchsorted(cameras.frames, frame))
        camera = event.client.camera
        camera.wxyz = np.array(_quaternion(cameras.rotations[index].T))
        camera.position = cameras.positions[index]

    def _jump(self, frame: int) -> None:
        self.frame.value = frame
        self._update()

    def _shown(self, node: int) -> bool:
        if self.view.starts is None or self.mode.value == MODES[0]:
            return True
        frame = int(self.frame.value)
        return node <= frame if self.mode.value == MODES[1] else node == frame

    def _update(self) -> None:
        """Bring everything in line with the controls."""
        dropped = int(self.drop.value)
        with self.server.atomic():
            for node, cloud in enumerate(self._clouds):
                cloud.visible = self._shown(node)
                cloud.point_size = float(self.size.value) * self.distance / _PIXELS
                if dropped != self._dropped and self.view.sureness is not None:
                    rows = self._rows(node)
                    kept = self.view.sureness[rows] >= dropped
                    cloud.points = self.view.points[rows][kept]
                    cloud.colors = self.view.colors[rows][kept]
            self._dropped = dropped
            self._update_frusta()

    def _update_frusta(self) -> None:
        if self.view.cameras is None:
            return
        current = int(self.frame.value)
        for index, handle in enumerate(self._frusta):
            frame = int(self.view.cameras.frames[index])
            handle.visible = bool(self.cameras.value)
            if frame not in (current, self._drawn_frame):
                continue
            here = frame == current
            handle.color = _ACCENT if here else _QUIET
            frames = self.view.frames
            with_image = here and bool(self.image.value) and frames is not None
            handle.image = frames[frame] if with_image and frames is not None else None
        self._drawn_frame = current


def _check_address(host: str) -> None:
    """OSError when the host's name or address is not one of this machine's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)


def _quaternion(rotation: np.ndarray) -> tuple[float, float, float, float]:
    """w, x, y, z of a rotation [3, 3]."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation).as_quat(canonical=True)
    return float(w), float(x), float(y), float(z)
