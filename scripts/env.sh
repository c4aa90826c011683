# Define ee_llm_environment, which installs ee_llm into a Python environment and sets $PYTHON to its
# interpreter. The other scripts source this file. An up-to-date environment is not changed.
#
#   ee_llm_environment EXTRA...    EXTRA: extras of pyproject.toml, such as dev
#
# Environment variables:
#   EE_LLM_SYSTEM=1       Install into the active environment, for example in a CUDA container with
#                         its own torch; installed packages keep their versions. Default: .venv,
#                         which is created if it does not exist.
#   EE_LLM_TORCH_INDEX    An additional package index for torch. On Linux, torch from PyPI includes
#                         several GB of CUDA libraries. Without a GPU,
#                         EE_LLM_TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids them.
#   EE_LLM_PYTHON         The Python (3.11 or 3.12) that creates .venv.

set -o pipefail
ee_llm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

ee_llm_fail() {
    echo "ee-llm: $*" >&2
    exit 1
}

# Print the first of the given Pythons with a supported version; EE_LLM_PYTHON comes first.
ee_llm_find_python() {
    local candidate
    [[ -z "${EE_LLM_PYTHON:-}" ]] || set -- "$EE_LLM_PYTHON"
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

ee_llm_environment() {
    local extras="$*" stamp_folder hash
    cd "$ee_llm_root" || exit 1
    if [[ "${EE_LLM_SYSTEM:-0}" == 1 ]]; then
        PYTHON="$(ee_llm_find_python python python3)" ||
            ee_llm_fail "EE_LLM_SYSTEM=1, but no Python 3.11 or 3.12 is active. Set EE_LLM_PYTHON."
        stamp_folder="$("$PYTHON" -c 'import sys; print(sys.prefix)')"
    else
        PYTHON="$ee_llm_root/.venv/bin/python"
        stamp_folder="$ee_llm_root/.venv"
        if [[ ! -x "$PYTHON" ]]; then
            local base
            base="$(ee_llm_find_python python3.12 python3.11 python3 python)" ||
                ee_llm_fail "Python 3.11 or 3.12 was not found. Install one, or set EE_LLM_PYTHON."
            echo "ee-llm: creating .venv with $base"
            "$base" -m venv "$ee_llm_root/.venv" ||
                ee_llm_fail "$base cannot create environments. On Debian: apt install python3-venv"
        fi
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 ||
        ee_llm_fail "$PYTHON has no pip. If .venv is incomplete, remove it and run this again."
    # A hash of everything that determines the packages. If it is unchanged, nothing is installed.
    hash="$("$PYTHON" - "$ee_llm_root" pyproject.toml setup.py constraints.txt <<'PYTHON_CODE'
import hashlib, pathlib, sys
root, *names = sys.argv[1:]
parts = [root, sys.version, *(pathlib.Path(root, name).read_text() for name in names)]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON_CODE
)"
    local extra missing=0
    for extra in core $extras; do
        [[ "$(cat "$stamp_folder/.ee_llm-$extra" 2>/dev/null)" == "$hash" ]] || missing=1
    done
    if [[ $missing == 1 ]]; then
        ee_llm_install $extras
        for extra in core $extras; do
            echo "$hash" 2>/dev/null >"$stamp_folder/.ee_llm-$extra" || true
        done
    fi
}

ee_llm_install() {
    local target="." constraints="constraints.txt" temporary=""
    [[ $# -gt 0 ]] && target=".[$(IFS=,; echo "$*")]"
    if [[ "${EE_LLM_SYSTEM:-0}" == 1 ]]; then
        temporary="$(mktemp)"
        ee_llm_kept_constraints >"$temporary" || ee_llm_fail "cannot list the packages of $PYTHON"
        constraints="$temporary"
    fi
    echo "ee-llm: installing $target into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
    if [[ -z "${EE_LLM_TORCH_INDEX:-}" && "$(uname)" == Linux ]] &&
        ! command -v nvidia-smi >/dev/null &&
        ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then
        echo "ee-llm: this machine has no GPU. For a smaller download, set" \
            "EE_LLM_TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    fi
    local log status=0
    log="$(mktemp)"
    "$PYTHON" -m pip install --progress-bar off --disable-pip-version-check \
        ${EE_LLM_TORCH_INDEX:+--extra-index-url "$EE_LLM_TORCH_INDEX"} \
        --constraint "$constraints" --editable "$target" 2>&1 |
        tee "$log" | ee_llm_progress || status=$?
    [[ $status == 0 ]] || cat "$log" >&2
    rm -f "$log" ${temporary:+"$temporary"}
    [[ $status == 0 ]] || ee_llm_fail "the installation failed. See the output above."
}

# Print constraints.txt with the installed version of every package that is installed: it may be
# built for this machine, and other packages may need it.
ee_llm_kept_constraints() {
    "$PYTHON" - constraints.txt <<'PYTHON_CODE'
import importlib.metadata, pathlib, sys
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    name, is_pin, _ = line.partition("==")
    try:
        print(f"{name}=={importlib.metadata.version(name)}" if is_pin else line)
    except importlib.metadata.PackageNotFoundError:
        print(line)
PYTHON_CODE
}

# Show pip's output as one changing line in a terminal, and elsewhere only its longer steps.
ee_llm_progress() {
    local line
    while IFS= read -r line; do
        if [[ -t 1 ]]; then
            printf '\r\033[K  %.70s' "${line#"${line%%[![:space:]]*}"}"
        elif [[ "$line" =~ ^\ *Downloading.*[0-9]{2}\.[0-9]\ MB || "$line" == Installing\ coll* ]]; then
            printf '  %.70s\n' "${line#"${line%%[![:space:]]*}"}"
        fi
    done
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
}
