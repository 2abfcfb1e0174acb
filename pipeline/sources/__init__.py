"""WHERE pictures come from: one file a source kind, one table."""

from __future__ import annotations

#: Source name -> its settings class ("module:attribute"), resolved with pkgutil.resolve_name.
SOURCES: dict[str, str] = {
    "cifar-captions": "pipeline.sources.cifar_captions:CifarCaptions",
    "folder": "pipeline.sources.folder:Folder",
    "hf": "pipeline.sources.hf:HubDataset",
    "openmoji": "pipeline.sources.openmoji:OpenMoji",
    "textcaps": "pipeline.sources.textcaps:TextCaps",
    "urls": "pipeline.sources.urls:Urls",
}
