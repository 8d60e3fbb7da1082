# Sourced by scripts/quickstart and scripts/test: goes to the repository root and makes .venv hold the pinned development environment.
# Nothing is installed when .venv already matches constraints.txt and pyproject.toml. RING_HF_PYTHON names another interpreter to
# build it from; RING_HF_VENV names an environment of your own to use instead, as it is. RING_HF_VERSIONS=oldest (or newest) takes
# .venv-oldest and constraints-oldest.txt instead. Leaves $python and its folder on PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions="${RING_HF_VERSIONS:+-$RING_HF_VERSIONS}"
constraints="constraints$versions.txt" venv=".venv$versions"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${RING_HF_PYTHON:+"$RING_HF_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ "$candidate" = "${RING_HF_PYTHON:-}" ] && fail "RING_HF_PYTHON=$candidate is not a Python >= 3.11 that runs here."
    done
    fail "Python >= 3.11 is needed (Transformers 5 asks for it); $(python3 --version 2>/dev/null || echo 'no python3') was found." \
        "Install one, or point RING_HF_PYTHON at it."
}

pip_install() {
    # pip's own quiet mode says nothing for minutes; its full output is hundreds of lines. Keep one short line per package, and errors.
    "$python" -m pip install --disable-pip-version-check "$@" 2> >(grep -v '^WARNING' >&2) |
        { grep --line-buffered -E '^(Collecting|Installing|Successfully)' || true; } | cut -c 1-100
}

install_torch() {
    # On Linux the default index serves a CUDA build of several gigabytes. Without an NVIDIA GPU take PyTorch's CPU index instead;
    # where that cannot be reached (mirrors, closed networks) fall back to the default index at once rather than after five retries.
    # --no-deps: the other pins live on the default index and are installed in the next step.
    local pin
    pin="$(grep '^torch==' "$constraints")"
    "$python" -c "import torch" 2>/dev/null && return
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        echo "no NVIDIA GPU found: installing the CPU build of $pin"
        pip_install --no-deps --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$pin" 2>/dev/null && return
        echo "PyTorch's CPU index cannot be reached: taking $pin from the default index"
    fi
    pip_install --no-deps "$pin"
}

find_stamp() {
    cat "$constraints" pyproject.toml | cksum
}

make_environment() {
    [ -f "$constraints" ] || fail "RING_HF_VERSIONS=$RING_HF_VERSIONS is not known: there is no $constraints."
    if [ ! -x "$venv/bin/python" ]; then
        local base
        base="$(find_python)" || exit 1
        echo "creating $venv with $("$base" --version)"
        "$base" -m venv "$venv" || fail "$base cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv."
    fi
    if [ "$(cat "$venv/ring_hf.stamp" 2>/dev/null)" != "$(find_stamp)" ]; then
        echo "installing the pinned environment into $venv (once; a few minutes, most of it torch)"
        local started=$SECONDS
        install_torch
        pip_install -c "$constraints" -e ".[dev]"
        find_stamp >"$venv/ring_hf.stamp"
        echo "installed in $((SECONDS - started)) s"
    fi
}

environment="${RING_HF_VENV:-$PWD/$venv}"
python="$environment/bin/python"
PATH="$environment/bin:$PATH"
export PATH VIRTUAL_ENV="$environment"
if [ -z "${RING_HF_VENV:-}" ]; then
    make_environment
elif [ ! -x "$python" ]; then
    fail "RING_HF_VENV=$RING_HF_VENV holds no bin/python. Point it at a virtual environment, or leave it unset."
fi
