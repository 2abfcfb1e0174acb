"""WHERE pictures come from: one file a source kind, one table."""

from __future__ import annotations

#: Source name -> its settings class ("module:attribute"), resolved with pkgutil.resolve_name.
SOURCES: dict[str, str] = {
    "openmoji": "pipeline.sources.openmoji:OpenMoji",
    "urls": "pipeline.sources.urls:Urls",
    "cifar-captions": "pipeline.sources.cifar_captions:CifarCaptions",
}
