"""Build the C form of the noise beside its source: run this file. Installing lipnet does, where there is a C compiler, before anything is there to import."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).with_name("_noise.c")
LIBRARY = pathlib.Path(__file__).with_name("_noise.so")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared")


def digest() -> str:
    """The sha256 of the source; the library carries that of the one it was built from."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def build(target: pathlib.Path = LIBRARY) -> str | None:
    """Compile with `CC`, or the first of cc, gcc and clang there is. None, or the reason why there is no library now."""
    compiler = shlex.split(os.environ.get("CC", "")) or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    if not compiler:
        return "there is no C compiler (cc, gcc, clang, or what CC names)"
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = pathlib.Path(folder) / target.name
            command = [*compiler, *FLAGS, f'-DSOURCE="{digest()}"', str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(target)
    except subprocess.CalledProcessError as error:
        return f"{compiler[0]} fails: {(error.stderr.strip().splitlines() or ['it gives no reason'])[0]}"
    except OSError as error:
        return f"{compiler[0]} cannot be run, or the folder not written to ({error.strerror})"
    return None


if __name__ == "__main__":
    sys.exit(build())
