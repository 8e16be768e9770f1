# Sourced by scripts/demo and scripts/test: a virtual environment in .venv with everything darefine needs.
#
#   PYTHON=python3.12       interpreter to build it with (3.10 or newer)
#   DAREFINE_TORCH="..."    what to give pip for torch, where the default is wrong for your machine, for instance
#                           PyTorch's own index for CPU-only or another CUDA version
#   DAREFINE_VENV=.venv     where it lies

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv=${DAREFINE_VENV:-.venv}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "darefine needs Python 3.10 or newer; set PYTHON to one" >&2
    return 1
}

make_environment() { # extras
    local python wanted="$1 $(cksum setup.cfg pyproject.toml | cksum)"
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python) || return 1
        echo "Creating $venv with $("$python" --version)"
        "$python" -m venv "$venv" || return 1
    fi
    if [ "$(cat "$venv/.darefine-installed" 2>/dev/null)" != "$wanted" ]; then
        local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
        # torch goes first: without a GPU its plain name may bring gigabytes of CUDA libraries that nothing will use.
        if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
            local torch=${DAREFINE_TORCH:-}
            if [ -z "$torch" ]; then
                if nvidia-smi >/dev/null 2>&1; then torch='torch>=2.4'; else torch='torch==2.13.0'; fi
            fi
            echo "Installing $torch"
            # shellcheck disable=SC2086
            "${pip[@]}" $torch || return 1
        fi
        echo "Installing darefine and what it needs"
        "${pip[@]}" -e ".[$1]" || return 1
        echo "$wanted" >"$venv/.darefine-installed"
    fi
}
