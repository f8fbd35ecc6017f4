"""Installs jaxkl and one of pyproject.toml's dependency groups into an environment.

`.ci/install.py .venv-test/has-lint` installs the group `lint` into `.venv-test`, which
is made if there is none, and then the file `has-lint`. Two of these commands at once
wait for each other. Arguments that are not described here are pip's.
"""

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


PYPROJECT = Path("pyproject.toml")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("marker", type=Path, help="environment/has-group")
    parser.add_argument("--without-dependencies", default="", help="what to add last")
    args, options = parser.parse_known_args()
    environment, marker = args.marker.parent, args.marker
    environment.mkdir(exist_ok=True)
    with open(environment / "lock", "w") as lock:
        if waited(lock, environment) and is_new(marker):
            return
        start = time.monotonic()
        print(f"Installing {group(marker)} into {environment}: once", flush=True)
        install(environment, marker, options, shlex.split(args.without_dependencies))
        print(f"Installed in {time.monotonic() - start:.0f} s", flush=True)


def waited(lock, environment):
    """Takes the lock, and returns whether another command had it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        print(f"Another command installs into {environment}: waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return True


def is_new(marker):
    return marker.exists() and marker.stat().st_mtime >= PYPROJECT.stat().st_mtime


def group(marker):
    return marker.name.removeprefix("has-")


def install(environment, marker, options, without_dependencies):
    others = {*environment.glob("has-*")} - {marker}
    # Programs that run there at the time must find jaxkl: it is installed once, though
    # again when pyproject.toml is newer.
    is_there = others and all(map(is_new, others))
    jaxkl = ["jaxkl"] if is_there else ["--editable", "."]
    # pip is asked for the environment's other groups too, so that it keeps the versions
    # that they need. If it is interrupted, none of the files are left.
    markers = sorted({marker, *others})
    for each in markers:
        each.unlink(missing_ok=True)
    python = environment / "bin" / "python"
    if not (environment / "bin" / "pip").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip(python, "--quiet", "pip>=25.1")  # The first that knows groups.
    pip(python, *jaxkl, *[f"--group={group(each)}" for each in markers], *options)
    if without_dependencies:
        pip(python, "--no-deps", *without_dependencies)
    for each in markers:
        each.touch()


def pip(python, *arguments):
    """Runs `pip install`, and shows a line of it every few seconds. To compile the many
    modules that nothing imports would take as long as the rest.
    """
    start = said = time.monotonic()
    with subprocess.Popen(
        [python, "-m", "pip", "install", "--no-compile", *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout or ():
            line, now = line.strip(), time.monotonic()
            last = line.startswith("Installing collected packages")
            if last or (now - said > 3 and line[:1].isalpha()):
                print(f"  {now - start:3.0f} s: {line:.70}", flush=True)
                said = now
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
