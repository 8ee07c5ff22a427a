"""What the paper reports for its own model: Gen3R, arXiv 2601.04090v2 (CVPR 2026).

Each figure with the table it stands in. Tables 1, 2 and 6: generation with camera conditions.
Table 3 ("Ours", not "VAE only") and table 8: reconstruction from all frames without cameras.
Table 5: how well generated cameras follow the asked ones. Distances are in each data set's own
unit. The paper gives no RRE and no RTE, and pose AUC@30 for two data sets only.
"""

from __future__ import annotations

Key = tuple[str, str, str]  # data set, task, figure

_APPEARANCE = ("psnr", "ssim", "lpips")
_GEOMETRY = ("accuracy", "completeness", "chamfer")
_POSE = ("auc30",)

_TABLES: tuple[tuple[str, tuple[str, ...], dict[tuple[str, str], tuple[float, ...]]], ...] = (
    (
        "table 1",
        _APPEARANCE,
        {
            ("realestate10k", "1view"): (20.51, 0.7388, 0.2281),
            ("realestate10k", "2view"): (27.05, 0.8732, 0.1352),
            ("dl3dv", "1view"): (16.38, 0.5821, 0.4234),
            ("dl3dv", "2view"): (18.59, 0.6149, 0.3416),
        },
    ),
    (
        "table 2",
        _GEOMETRY,
        {
            ("co3d", "1view"): (0.8284, 1.3811, 1.1047),
            ("co3d", "2view"): (0.7237, 1.2298, 0.9767),
            ("wildrgbd", "1view"): (0.1581, 0.2402, 0.1992),
            ("wildrgbd", "2view"): (0.1109, 0.1744, 0.1426),
            ("tartanair", "1view"): (3.0250, 2.5367, 2.7809),
            ("tartanair", "2view"): (2.2825, 1.6643, 1.9734),
        },
    ),
    (
        "table 3",
        _GEOMETRY,
        {
            ("co3d", "allview"): (0.9270, 0.9980, 0.9625),
            ("wildrgbd", "allview"): (0.1058, 0.1463, 0.1260),
            ("tartanair", "allview"): (1.9243, 1.0959, 1.5101),
        },
    ),
    (
        "table 5",
        _POSE,
        {
            ("realestate10k", "1view"): (0.7443,),
            ("realestate10k", "2view"): (0.7732,),
            ("wildrgbd", "1view"): (0.8004,),
            ("wildrgbd", "2view"): (0.8098,),
        },
    ),
    (
        "table 6",
        _APPEARANCE,
        {
            ("co3d", "1view"): (16.09, 0.5754, 0.4997),
            ("co3d", "2view"): (18.01, 0.6085, 0.4371),
            ("wildrgbd", "1view"): (14.73, 0.5501, 0.4398),
            ("wildrgbd", "2view"): (18.88, 0.6448, 0.3256),
            ("tartanair", "1view"): (15.04, 0.5069, 0.5073),
            ("tartanair", "2view"): (17.34, 0.5581, 0.4416),
        },
    ),
    (
        "table 8",
        _POSE,
        {("realestate10k", "allview"): (0.8265,), ("wildrgbd", "allview"): (0.8391,)},
    ),
)

PUBLISHED: dict[Key, tuple[float, str]] = {
    (dataset, task, figure): (value, table)
    for table, figures, rows in _TABLES
    for (dataset, task), values in rows.items()
    for figure, value in zip(figures, values, strict=True)
}
