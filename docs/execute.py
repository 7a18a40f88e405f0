"""Run notebooks in place to refresh their outputs: `python docs/execute.py [NOTEBOOK ...]`.

Cells marked `#| eval: false`, or with a flag of `tst_flags`, keep the outputs that they have.
"""
import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.process import extract_directives
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"


class Client(NotebookClient):
    """A client that leaves out the cells that nbdev's tests leave out."""

    async def async_execute_cell(self, cell, *args, **kwargs):
        flags = extract_directives(cell, remove=False)
        skip = set(get_config().tst_flags.split())
        if flags.get("eval:", [""])[0].lower() == "false" or skip & flags.keys(): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def smaller(png):
    """A picture with at most 128 colours, as a notebook keeps it: a quarter of the bytes, the same to the eye."""
    file, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(path):
    """Run the notebook at `path` from its own folder and write it back."""
    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=600, record_timing=False, coalesce_streams=True,
           extra_arguments=["--log-level=ERROR"],      # no word about the connection on this machine
           resources={"metadata": {"path": str(path.parent)}}).execute()
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:  # a widget without its kernel is a dead picture with a random name
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
            for data in (out.data for out in cell.outputs if "image/png" in out.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    nbformat.write(nb, path)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("MPLBACKEND", None)  # the kernel's inline backend draws into the cells
    for path in map(Path, sys.argv[1:] or sorted(get_config().nbs_path.glob("*.ipynb"))):
        print(path, flush=True)
        execute(path)
