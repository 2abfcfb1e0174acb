"""Run as a script: pictures from an exported folder, in a process that has none of our packages.

argv: folder, a .npy for the pictures, JSON with `prompts` and the options of the pipeline.
"""

import importlib.abc
import json
import sys
from typing import Any

OURS = ("training", "pipeline", "captioning", "tests", "composer", "streaming", "open_clip")


class Blocked(importlib.abc.MetaPathFinder):
    """Stands before the finder of the editable install, which site-packages brings."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"no module named {fullname} here", name=fullname)
        return None


sys.meta_path.insert(0, Blocked())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # noqa: E402

torch.set_num_threads(1)
folder, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipe: Any = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder, trust_remote_code=True
)
pipe.set_progress_bar_config(disable=True)
images = pipe(options.pop("prompts"), **options).images
np.save(target, np.stack([np.asarray(image) for image in images]))
assert not [name for name in sys.modules if name.split(".")[0] in OURS]
