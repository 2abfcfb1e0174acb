"""WHAT is done: one file a verb of `pipeline run`, one table."""

from __future__ import annotations

#: Stage name -> class ("module:attribute"); `pipeline run all` runs them in this order.
STAGES: dict[str, str] = {
    "download": "pipeline.stages.download:Download",
    "caption": "pipeline.stages.caption:CaptionStage",
    "encode": "pipeline.stages.encode:Encode",
}
