"""WHERE pictures come from: one file a source kind, one table."""

from __future__ import annotations

#: Source name -> its settings class ("module:attribute"), resolved with pkgutil.resolve_name.
SOURCES: dict[str, str] = {
    "cc12m": "pipeline.sources.cc12m:CC12M",
    "cifar-captions": "pipeline.sources.cifar_captions:CifarCaptions",
    "coco2014": "pipeline.sources.coco2014:Coco2014",
    "diffusiondb": "pipeline.sources.diffusiondb:DiffusionDB",
    "folder": "pipeline.sources.folder:Folder",
    "hf": "pipeline.sources.hf:HubDataset",
    "journeydb": "pipeline.sources.journeydb:JourneyDB",
    "openmoji": "pipeline.sources.openmoji:OpenMoji",
    "sa1b": "pipeline.sources.sa1b:SA1B",
    "textcaps": "pipeline.sources.textcaps:TextCaps",
    "urls": "pipeline.sources.urls:Urls",
    "webdataset": "pipeline.sources.webdataset:WebDataset",
}
