# Installs the project; quickstart.sh and run_tests.sh source it. From bash:  source setup.sh
# Creates .venv beside this file, installs requirements.txt and the project (editable) into it, and activates it. If that
# was done before, it only activates, at once and without a network. PYTHON=/path/to/python3 chooses the interpreter of a
# new .venv.
#
# To install into an environment of your own instead, run these in this order (DeepSpeed imports torch while it builds):
#   grep -v '^deepspeed==' requirements.txt >pins.txt && pip install -r pins.txt
#   pip install --no-build-isolation -r requirements.txt
#   pip install --no-deps --no-build-isolation -e .
# An unpacked archive works without the last line, or where the requirements are installed already, if its folder is on
# PYTHONPATH.

if [ -z "${BASH_VERSION:-}" ]; then
    echo "setup.sh: needs bash; start bash, then: source setup.sh" >&2
    return 1
fi

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

SETUP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# What an installation depends on: the pinned versions, the project's packages and folder, and the interpreter.
setup_stamp() {
    "$SETUP_ROOT/.venv/bin/python" - "$SETUP_ROOT"/{requirements.txt,pyproject.toml} 2>/dev/null <<'PY'
import hashlib, pathlib, sys
content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(content).hexdigest(), sys.version.split()[0], pathlib.Path(sys.argv[1]).parent.resolve())
PY
}

set_up() {
    local venv=$SETUP_ROOT/.venv stamp=$SETUP_ROOT/.venv/installed.txt python start=$SECONDS pins
    if [[ -s $stamp && $(setup_stamp) == "$(<"$stamp")" ]]; then
        return
    fi
    say "Set-up: installs requirements.txt into $venv; takes about 3 minutes (once), needs a network and 3 GB, more with a GPU"
    command -v "${CXX:-g++}" >/dev/null || die "g++: not found, DeepSpeed needs a C++ compiler; install one (Debian: apt-get install g++) or set CXX."
    rm -f "$stamp"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || die "${PYTHON:-python3}: Python 3.10 or newer is needed; install one or set PYTHON=/path/to/python3."
        "$python" -m venv --clear "$venv" ||
            die "$venv: $python cannot create it; install its venv module (Debian: apt-get install python3-venv)."
    fi
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$venv: made with a Python older than 3.10; remove it and rerun the command."
    # torch first: DeepSpeed imports it while it builds. DeepSpeed last, and built in this environment, not an isolated one.
    pins=$(mktemp) || die "Set-up: no temporary file can be made; free space in ${TMPDIR:-/tmp} or set TMPDIR."
    grep -E '^(torch|setuptools|wheel|ninja|numpy)==' "$SETUP_ROOT/requirements.txt" >"$pins" || die "$pins: cannot be written."
    "$venv/bin/python" -m pip install -r "$pins" || die "Set-up: pip failed at torch (above); fix this and rerun the command; what is installed stays."
    grep -v '^deepspeed==' "$SETUP_ROOT/requirements.txt" >"$pins" || die "$pins: cannot be written."
    "$venv/bin/python" -m pip install -r "$pins" || die "Set-up: pip failed (above); fix this and rerun the command; what is installed stays."
    "$venv/bin/python" -m pip install --no-build-isolation -r "$SETUP_ROOT/requirements.txt" ||
        die "Set-up: pip failed at deepspeed (above); fix this and rerun the command; what is installed stays."
    rm -f "$pins"
    # Editable: imports find this folder's files, whatever folder a script is run from.
    "$venv/bin/python" -m pip install --no-deps --no-build-isolation -e "$SETUP_ROOT" ||
        die "Set-up: pip failed at the project itself (above); fix this and rerun the command; what is installed stays."
    setup_stamp >"$stamp" || die "$stamp: cannot be written." # last: an interrupted installation has no stamp and is continued next time
    say "Set-up: done in $((SECONDS - start)) s"
}

# In a subshell: an error in it must not close the shell that sources this file.
(set_up) || { return 1 2>/dev/null || exit 1; }
source "$SETUP_ROOT/.venv/bin/activate"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# OpenMP's threads wait for each other by spinning, which wastes most of the time of a shared CPU:
# see docs/performance.md.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
# Scripts use these functions; an interactive shell has no use for them.
[[ $- != *i* ]] || unset -f say die find_python setup_stamp set_up
