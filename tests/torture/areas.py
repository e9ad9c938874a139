"""All areas by name, the cheap ones first."""

from __future__ import annotations

from torture import (
    attacks,
    batches,
    checkpoints,
    coco_files,
    entries,
    evaluation,
    images,
    inference,
    masks,
    named,
    ops,
    ranks,
    training,
)

AREAS = {
    area.name: area
    for area in (
        attacks.AREA,
        checkpoints.KILLS,
        checkpoints.FULL_DISKS,
        checkpoints.DAMAGE,
        images.AREA,
        named.AREA,
        coco_files.AREA,
        inference.AREA,
        entries.AREA,
        training.TRAINING,
        batches.AREA,
        training.INTERRUPTS,
        ranks.AREA,
        evaluation.AREA,
        ops.AREA,
        masks.AREA,
    )
}
