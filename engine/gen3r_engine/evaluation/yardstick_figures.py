"""The yardstick's figures: scenes against those of the exact preset, and against the truth."""

from __future__ import annotations

from gen3r_engine.evaluation import measures
from gen3r_engine.evaluation.batches import Generated
from gen3r_engine.evaluation.figures import Figure
from gen3r_engine.evaluation.held_out import UNSEEN, true_w2c
from gen3r_training.procedural import Clips


def to_exact(made: dict[str, Generated], reference: dict[str, Generated]) -> tuple[Figure, ...]:
    """Video, depth and cameras of all tasks together against those of the reference."""
    psnr: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    depth: tuple[float, ...] = ()
    auc: tuple[float, ...] = ()
    note = ""
    for task, found in made.items():
        wanted = reference[task]
        psnr += measures.frame_psnr(found.video, wanted.video)
        values, note = measures.frame_lpips(found.video, wanted.video)
        lpips += values
        depth += measures.depth_errors(found.depths, wanted.depths)
        auc += measures.pose_aucs(found.poses, wanted.poses)
    return (
        Figure("to exact", "PSNR", "dB", psnr),
        Figure("to exact", "LPIPS", "", lpips, at_least=False, note=note),
        Figure("to exact", "depth AbsRel", "", depth, at_least=False),
        Figure("to exact", "pose AUC@30", "", auc),
    )


def to_truth(made: dict[str, Generated], clips: Clips) -> tuple[Figure, ...]:
    """What the task does not give, against the truth."""
    depth, poses = clips.depth.cpu().float(), true_w2c(clips)
    found = []
    for task in ("2view", "1view"):
        if task in made:
            psnr = measures.frame_psnr(made[task].video, clips.rgb, UNSEEN[task])
            found.append(Figure(task, "PSNR", "dB", psnr))
    if "allview" in made:
        errors = measures.depth_errors(made["allview"].depths, depth)
        found.append(Figure("allview", "depth AbsRel", "", errors, at_least=False))
    for task in ("allview", "1view"):
        if task in made:
            auc = measures.pose_aucs(made[task].poses, poses)
            found.append(Figure(task, "pose AUC@30", "", auc))
    return tuple(found)
