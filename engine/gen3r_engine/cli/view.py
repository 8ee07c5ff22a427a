"""Look at a finished scene in a browser: points, cameras, frames.

On this machine, or through the ssh line that it prints:
  gen3r-engine view outputs/1view/20261122_1730

One page to keep or to send, which needs neither server nor network:
  gen3r-engine view outputs/1view/20261122_1730 --static
  gen3r-engine view outputs/1view/20261122_1730 --static room.html --max-points 300000
"""

from __future__ import annotations

import argparse
import getpass
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.progress import note

if TYPE_CHECKING:
    from gen3r_engine.view.scene_view import SceneView

HELP = "look at a finished scene in a browser"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, where to serve it, or the page to write."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="a scene's folder: OUTPUT_DIR/TASK/TIME")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8080, help="port; the next free one if taken (default: 8080)")
    add(
        "--static",
        nargs="?",
        const="",
        metavar="FILE.html",
        help="write one self-contained page instead (default: DIR/view.html)",
    )
    add("--max-points", type=int, default=1_000_000, help="points shown (default: 1000000)")


def main(args: argparse.Namespace) -> int:
    """Read the folder, then write the page or serve until Ctrl-C."""
    from gen3r_engine.view.scene_folder import read_folder

    if args.max_points < 1:
        raise UsageError(f"--max-points {args.max_points} is below 1; use 1000000 or fewer")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port} is no port; use 8080, or 0 to 65535")
    folder = Path(args.folder)
    with user_input():
        view = read_folder(folder, args.max_points)
    for text in view.notes:
        note(text)
    for text in view.missing:
        note(f"not shown, {text}")
    if not len(view.points):
        note("the cloud is empty")
    if args.static is not None:
        return _write(view, Path(args.static) if args.static else folder / "view.html")
    return _serve(view, args.host, args.port)


def _write(view: SceneView, path: Path) -> int:
    from gen3r_engine.caches import write_whole
    from gen3r_engine.view.static_page import static_page

    with user_input(f"{path} can not be written", (OSError,), code=1):
        write_whole(path, static_page(view))
    print(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _serve(view: SceneView, host: str, port: int) -> int:
    from gen3r_engine.view.server import SceneServer

    with user_input(f"--host {host}", (OSError,)), user_input("", (ValueError,)):
        server = SceneServer(view, host, port)
    print(f"page: http://{host}:{server.port}   (Ctrl-C ends it)")
    if host in _LOCAL:
        print(
            "from another machine:\n"
            f"  ssh -L {server.port}:127.0.0.1:{server.port} {_user()}@{socket.gethostname()}\n"
            f"  then open http://127.0.0.1:{server.port} there",
            flush=True,
        )
    try:
        wait_for_ctrl_c()
    except KeyboardInterrupt:
        print("page closed")
    finally:
        server.stop()
    return 0


def wait_for_ctrl_c() -> None:
    """Sleep until a signal raises."""
    threading.Event().wait()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this user id (a container)
        return "USER"
