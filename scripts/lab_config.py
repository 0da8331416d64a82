"""How `make lab` opens the notebooks: as they were run, and without an unsaved dot.

The files hold no execution counts, no version of Python and no kernel's display name, so that they are the same on every machine
(nbdev_clean sees to it). Lab puts them in as soon as a kernel starts, and then calls the notebook changed. Here they are put in before."""

import sys
from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

sys.path.insert(0, str(Path(__file__).parent))
from run_notebooks import is_run


class Notebooks(AsyncLargeFileManager):
    async def get(self, path, content=True, *args, **options):
        model = await super().get(path, content, *args, **options)
        if content and model["type"] == "notebook": self.complete(model["content"])
        return model

    def complete(self, notebook):
        kernel = notebook.metadata.get("kernelspec", {})
        if kernel.get("name") != "python3": return  # no notebook of the course
        kernel["display_name"] = self.parent.kernel_spec_manager.get_kernel_spec("python3").display_name
        notebook.metadata["language_info"] = dict(IPythonKernel.language_info)
        if not any(cell.get("outputs") for cell in notebook.cells): return
        for count, cell in enumerate(filter(is_run, notebook.cells), 1):
            cell.execution_count = cell.execution_count or count
            for output in cell.outputs:
                if "execution_count" in output: output["execution_count"] = cell.execution_count


c.ServerApp.contents_manager_class = Notebooks  # noqa: F821
